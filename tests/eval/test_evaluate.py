"""From pictures to numbers: features once, metrics with intervals and warnings, statistics files, the command, two processes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.cli import eval as command
from genkit.cli.main import main
from genkit.eval import metrics
from genkit.eval.evaluate import evaluate
from genkit.eval.extract import Extractor, FeatureSet, extract
from genkit.eval.frechet import GaussianStatistics
from genkit.eval.html import write_html
from genkit.eval.pictures import Picture, Source, open_source
from genkit.eval.protocols import MEANING, PROTOCOLS, Protocol, explain, get_protocol
from genkit.eval.resize import RESIZES
from genkit.eval.statistics_files import is_statistics, read_statistics

ROOT = Path(__file__).parents[2]
LITE = get_protocol("lite0", size=32)


def write(folder: Path, count: int, seed: int, shift: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = folder / ("red" if i % 2 else "blue")
        label.mkdir(parents=True, exist_ok=True)
        array = rng.integers(0, 150, (20 + i % 3, 24, 3)) + shift
        array[..., 0 if i % 2 else 2] += 100 - shift
        Image.fromarray(array.astype(np.uint8)).save(label / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root / "real", 26, 0)
    write(root / "fake", 22, 1, shift=40)
    return root


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor(LITE)


class Counting(Source):
    """A source that counts how often its pictures are read."""

    in_workers = False

    def __init__(self, inner: Source) -> None:
        self.inner, self.name, self.read_count = inner, inner.name, 0

    def __len__(self) -> int:
        return len(self.inner)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()

    def read(self, index: int) -> Picture:
        self.read_count += 1
        return self.inner.read(index)


# ---- features ----


def test_features_do_not_depend_on_batches_or_workers_and_are_kept(data: Path, tmp_path: Path, extractor: Extractor) -> None:
    source = Counting(open_source(data / "fake"))
    seen: list[tuple[int, int]] = []
    first = extract(source, extractor, ["1280"], batch_size=5, cache=tmp_path, progress=lambda done, total, s: seen.append((done, total)))
    assert source.read_count == 22 and seen[-1] == (22, 22) and len(seen) == 5
    again = extract(source, extractor, ["1280"], batch_size=3, cache=tmp_path)
    assert source.read_count == 22
    torch.testing.assert_close(again.tensor("1280"), first.tensor("1280"), rtol=0, atol=0)
    for options in ({"batch_size": 22}, {"batch_size": 7, "workers": 2}):
        other = extract(open_source(data / "fake"), extractor, ["1280"], cache="", **options)  # type: ignore[arg-type]
        torch.testing.assert_close(other.tensor("1280"), first.tensor("1280"), rtol=1e-4, atol=1e-5)
    assert first.labels[:2] == ["blue", "blue"] and first.names[0] == "blue/000.png"
    assert not list(tmp_path.rglob("*.all"))


LARGE = """
import resource, sys
import numpy as np
from genkit.eval.extract import Extractor, extract
from genkit.eval.metrics import Data, compute
from genkit.eval.pictures import Picture, Source
from genkit.eval.protocols import get_protocol

class Endless(Source):
    name = "endless"
    in_workers = False
    def __len__(self): return int(sys.argv[1])
    def read(self, index): return Picture(np.full((512, 512, 3), index % 256, dtype=np.uint8), str(index))
    def fingerprint(self): return "endless"

protocol = get_protocol("lite0", size=32)
features = extract(Endless(), Extractor(protocol), ["1280"], batch_size=8, cache="")
result, = compute(["fid"], Data(protocol, features, features, with_intervals=False))
print(len(features), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_pictures() -> None:
    peaks = []
    for count in (1400, 2800):  # 1,400 more pictures are 1.1 GB, their features 7 MB; up to 1,280 samples are kept as they are
        done = subprocess.run([sys.executable, "-c", LARGE, str(count)], capture_output=True, text=True, check=True, cwd=ROOT)
        found, peak = map(int, done.stdout.split())
        assert found == count
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 80, f"{peaks} MB"


def test_unusable_pictures_are_all_listed_and_left_out_on_request(tmp_path: Path, extractor: Extractor) -> None:
    folder = write(tmp_path / "pictures", 8, 3)
    for name in ("blue/zzz.png", "red/aaa.png"):
        (folder / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"2 of 10 pictures.*zzz\.png cannot be decoded.*aaa\.png cannot be decoded.*--skip-bad"):
        extract(open_source(folder), extractor, ["1280"], batch_size=2, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))
    found = extract(open_source(folder), extractor, ["1280"], batch_size=4, skip_bad=True, cache=tmp_path / "cache")
    assert len(found) == 8 and len(found.left_out) == 2 and "red/aaa.png" not in found.names
    whole = write(tmp_path / "whole", 8, 3)
    expected = extract(open_source(whole), extractor, ["1280"], cache="")
    torch.testing.assert_close(found.tensor("1280"), expected.tensor("1280"), rtol=1e-4, atol=1e-5)


def test_one_picture_is_not_enough(tmp_path: Path, extractor: Extractor) -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        extract(open_source(write(tmp_path / "one", 1, 4)), extractor, ["1280"], cache="")


def test_unknown_layers_and_wrong_weights_are_refused(data: Path, extractor: Extractor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown layer of efficientnet-lite0: '2048'"):
        extract(open_source(data / "fake"), extractor, ["2048"], cache="")
    with pytest.raises(ValueError, match="weights are given for the FID Inception network"):
        Extractor(LITE, tmp_path / "some.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Extractor(get_protocol("pytorch-fid"), tmp_path / "none.pth")


# ---- metrics ----


def run(names: Sequence[str], data: Path, **options: Any) -> dict[str, metrics.Result]:
    found = evaluate(names, open_source(data / "fake"), open_source(data / "real"), LITE, cache="", **options)
    return {result.metric: result for result in found.results}


def test_every_metric_of_a_network_without_classes(data: Path) -> None:
    found = run([name for name, metric in metrics.METRICS.items() if not metric.needs_inception], data)
    distance = found["frechet-efficientnet-lite0"]
    assert distance.ci is not None and distance.ci[0] < distance.value < distance.ci[1]
    assert any("not FID" in warning for warning in distance.warnings)
    assert any("biased upwards by about" in warning for warning in distance.warnings)
    assert (distance.num_real, distance.num_fake) == (26, 22)
    for share in ("precision", "recall", "coverage", "authenticity"):
        ci = found[share].ci
        assert ci is not None and 0 <= ci[0] <= found[share].value <= ci[1] <= 1
    assert found["kid"].details["std"] >= 0
    assert found["vendi"].real == "" and found["vendi"].num_real == 0


def test_extrapolation_comes_nearer_to_the_distance_of_the_distributions() -> None:
    rows = torch.randn(2000, 12).numpy()
    features = FeatureSet({"1280": rows}, [""] * 2000, [""] * 2000, {}, [], "normal")
    exact = GaussianStatistics.of_moments(torch.zeros(12, dtype=torch.float64), torch.eye(12, dtype=torch.float64), 10**6)
    results = {r.metric: r for r in metrics.compute(["fid", "fid-infinity"], metrics.Data(LITE, features, None, {"1280": exact}))}
    plain, far = results["frechet-efficientnet-lite0"].value, results["frechet-efficientnet-lite0-infinity"]
    assert abs(far.value) < 0.6 * plain and far.details["slope"] > 0
    assert far.ci is not None and far.ci[0] < far.value < far.ci[1]


def test_a_set_against_itself(data: Path) -> None:
    source = open_source(data / "real")
    found = evaluate(["fid", "precision-recall", "memorisation"], source, source, LITE, cache="", intervals=False)
    values = {result.metric: result.value for result in found.results}
    assert values["frechet-efficientnet-lite0"] == pytest.approx(0, abs=1e-9)
    assert (values["precision"], values["recall"], values["authenticity"]) == (1, 1, 0)
    assert all(result.ci is None for result in found.results)


def test_metrics_that_a_network_cannot_give_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="metric 'is' is defined on the FID Inception network"):
        run(["is"], data)
    with pytest.raises(ValueError, match="unknown metric 'fdi'.*Did you mean 'fid'"):
        run(["fdi"], data)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(5000, 1, dtype=torch.float64)
    variance = metrics.jackknife_rows(x, lambda rows: float(rows.mean()))
    assert variance == pytest.approx(1 / 5000, rel=1.0)
    groups = []
    for g in range(10):
        stats = GaussianStatistics(1)
        stats.update(x[g::10])
        groups.append(stats)
    assert metrics.jackknife(groups, lambda rest: float(rest.compute()[0])) == pytest.approx(variance, rel=1e-9)


def test_shares_have_intervals_inside_zero_and_one() -> None:
    assert metrics.share_interval(0.0, 10)[0] == 0 and 0.2 < metrics.share_interval(0.0, 10)[1] < 0.4
    low, high = metrics.share_interval(0.5, 10_000)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.5098, abs=1e-4)


# ---- protocols ----


def test_protocols_name_choices_that_exist() -> None:
    for protocol in PROTOCOLS.values():
        assert protocol.resize in RESIZES and protocol.name
        x = protocol.normalise(torch.tensor([0.0, 255.0]))
        assert float(x[0]) == -1 and 0.99 < float(x[1]) <= 1
    changed = get_protocol("pytorch-fid", size=128)
    assert changed.name == "pytorch-fid (size=128)" and changed.size == 128
    assert get_protocol("pytorch-fid", size=None) is PROTOCOLS["pytorch-fid"]
    assert {field for field in Protocol.__dataclass_fields__ if field not in ("name", "tap", "reference")} <= MEANING.keys()


def test_differences_are_told_in_words() -> None:
    def result(name: str, **extra: Any) -> dict[str, Any]:
        r = metrics.Result("fid", 1.0, None, get_protocol(name), 10, 20, "r", "f", "6726825d")
        return r.to_dict() | extra

    lines = explain(result("pytorch-fid"), result("clean-fid", num_fake=30))
    assert [line.split(":")[0] for line in lines] == ["resize", "value_range", "kid", "kid_seed", "num_fake"]
    assert "10 to 30 %" in lines[0] and "falls as it grows" in lines[-1]
    assert explain(result("adm"), result("adm")) == []


# ---- statistics ----


def test_statistics_round_trip_gives_the_same_distance(data: Path, tmp_path: Path, extractor: Extractor) -> None:
    stats = metrics.statistics_of(extract(open_source(data / "real"), extractor, ["1280"], cache=""), "1280")
    stats.save(tmp_path / "real.npz", protocol="lite0")
    assert is_statistics(tmp_path / "real.npz")
    found = evaluate(["fid"], open_source(data / "fake"), tmp_path / "real.npz", LITE, cache="", intervals=False).results[0]
    assert found.value == pytest.approx(run(["fid"], data, intervals=False)["frechet-efficientnet-lite0"].value, rel=1e-9)
    assert found.num_real == 26
    with pytest.raises(ValueError, match=r"this evaluation uses 'efficientnet-lite0.* to 64"):
        evaluate(["fid"], open_source(data / "fake"), tmp_path / "real.npz", get_protocol("lite0", size=64), cache="")
    with pytest.raises(ValueError, match="kid needs real pictures"):
        evaluate(["kid"], open_source(data / "fake"), tmp_path / "real.npz", LITE, cache="")


def moments(d: int = 4) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    x = np.random.default_rng(0).standard_normal((20, d))
    return x.mean(0), np.cov(x, rowvar=False)


def test_files_of_the_tools_are_read(tmp_path: Path) -> None:
    mean, covariance = moments()
    np.savez(tmp_path / "a.npz", mu=mean, sigma=covariance, mu_s=mean + 1, sigma_s=covariance, arr_0=np.zeros((1, 2, 2, 3)))
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": mean, "sigma": covariance}, "fd_dinov2": {}}))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"mu": mean, "sigma": covariance}))
    x = np.random.default_rng(1).standard_normal((50, 4))
    sums = {"num_items": 50, "raw_mean": x.sum(0), "raw_cov": x.T @ x, "capture_all": False}
    (tmp_path / "stylegan.pkl").write_bytes(pickle.dumps(sums))
    torch.save({"mu": mean, "sigma": covariance}, tmp_path / "fidelity.pt")
    for name in ("a.npz", "edm2.pkl", "plain.pkl", "fidelity.pt"):
        found = read_statistics(tmp_path / name).compute()
        np.testing.assert_allclose(found[0].numpy(), mean)
        np.testing.assert_allclose(found[1].numpy(), covariance)
    np.testing.assert_allclose(read_statistics(tmp_path / "a.npz", "spatial").compute()[0].numpy(), mean + 1)
    found = read_statistics(tmp_path / "stylegan.pkl").compute(ddof=0)
    np.testing.assert_allclose(found[1].numpy(), np.cov(x, rowvar=False, ddof=0), rtol=1e-9)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo harm",)


def test_wrong_statistics_are_refused(tmp_path: Path) -> None:
    mean, covariance = moments()
    bad = covariance.copy()
    bad[0, 1] += 1
    cases = {
        "nan": (mean * np.nan, covariance, "NaN or infinity"),
        "shape": (mean[:3], covariance, r"got \[3\] and \[4, 4\]"),
        "asymmetric": (mean, bad, "not symmetric"),
    }
    for name, (mu, sigma, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma)
        with pytest.raises(ValueError, match=message):
            read_statistics(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "lacking.npz", mu=mean)
    with pytest.raises(ValueError, match="lacks sigma"):
        read_statistics(tmp_path / "lacking.npz")
    (tmp_path / "harm.pkl").write_bytes(pickle.dumps({"mu": Harmful()}))
    with pytest.raises(ValueError, match=r"cannot be read safely.*posix\.system"):
        read_statistics(tmp_path / "harm.pkl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_statistics(tmp_path / "none.npz")


# ---- report and command ----


def test_page_shows_numbers_pictures_neighbours_classes_and_a_plot(data: Path) -> None:
    names = ["fid", "precision-recall"]
    found = evaluate(names, open_source(data / "fake"), open_source(data / "real"), LITE, cache="", intervals=False)
    page = write_html(found)
    assert page.count("<img") >= 22 + 26 + 2 * 22
    for text in ("Nearest neighbours", "Classes", ">red<", "<svg", "k=3", "frechet-efficientnet-lite0", "not FID"):
        assert text in page


def test_the_command_lists_the_metrics_there_are() -> None:
    assert set(command.METRICS) == metrics.METRICS.keys()
    assert set(command.WITHOUT_REAL) == {name for name, metric in metrics.METRICS.items() if not metric.needs_real}


LITE_OPTIONS = ["--network", "efficientnet-lite0", "--size", "32", "--device", "cpu", "--cache", ""]


def test_command_prints_one_json_object(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["eval", "fid", str(data / "real"), str(data / "fake"), *LITE_OPTIONS, "--json", "--no-ci"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert {"metric", "value", "ci", "protocol", "num_real", "num_fake"} <= found.keys()
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps(found | {"num_fake": 99}))
    assert main(["eval", "explain", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "num_fake: 22 against 99" in capsys.readouterr().out
    assert main(["eval", "statistics", str(data / "real"), str(tmp_path / "s.npz"), *LITE_OPTIONS]) == 0
    capsys.readouterr()
    assert main(["eval", "fid", str(tmp_path / "s.npz"), str(data / "fake"), *LITE_OPTIONS, "--json", "--no-ci"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == pytest.approx(found["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fid", "only-one"], "takes REAL FAKE, got 1: only-one"),
        (["precision-recal", "a", "b"], "Did you mean 'precision-recall'"),
        (["fid", "none-1", "none-2", "--network", "efficientnet-lite0"], "'none-1' does not exist"),
        (["fid", "a", "b", "--protocol", "pytorchfid"], "Did you mean 'pytorch-fid'"),
        (["fid", "a", "b", "--html", "x.html"], "--html goes with"),
        (["report", "a", "b", "--html", "no-such-folder/x.html"], "--html: there is no folder"),
        (["fid", ".", ".", "--network", "efficientnet-lite0", "--protocol", "adm"], "leave out --protocol adm"),
        (["explain", "a", "b"], "'a' does not exist"),
    ],
)
def test_command_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_two_processes_print_the_number_of_one(data: Path) -> None:
    words = ["fid", str(data / "real"), str(data / "fake"), *LITE_OPTIONS, "--json", "--batch-size", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script, found = str(ROOT / "eval" / "fid.py"), []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launcher, script, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.strip().startswith("{"), done.stderr
        found.append(json.loads(done.stdout))
    assert found[1]["num_fake"] == 22
    assert found[1]["value"] == pytest.approx(found[0]["value"], rel=1e-9)
    assert found[1]["ci"] == pytest.approx(found[0]["ci"], rel=1e-6)
