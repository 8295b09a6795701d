"""Distillation: few-step students from diffusion and flow teachers.

A method is a composition of small rules: which networks there are, how data is noised (`paths`), which levels are drawn (`levels`), how
the student learns (`matching`, `consistency`, ...), how a critic follows it (`denoising`), and in which order they step (`methods`).
"""
