"""A store is written in a smaller encoding without the teacher, and says what the teacher would have said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from storage.arrays import STATUS_OK
from storage.cli import COMMANDS, WithCommands
from storage.cli import main as logitstore
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.dense import loaded_values
from storage.encodings.values import ValueType
from storage.errors import DamageError, MismatchError, NotSealedError, PathError
from storage.manifest import Compressor, Manifest
from storage.reader import Store, open_store
from storage.scan import verify
from studenttrain.models import build_model
from teacherdump import transcode_cli
from teacherdump.config import ENCODINGS, DumpConfig
from teacherdump.run import run
from teacherdump.transcode import TranscodeOptions, TranscodeResult, choose_encoding, transcode
from tests.storage.scan_stores import manifest_of, write_store
from tests.teacherdump.small_dumps import Dump, dumper


@pytest.fixture(scope="module", params=["classes", "sequences"])
def dumped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return dumper(tmp_path_factory.mktemp(request.param), request.param)


def all_arrays(store: Store) -> dict[str, np.ndarray[Any, Any]]:
    return store.read([spec.name for spec in store.manifest.arrays], 0, store.num_sealed_rows)


def assert_same_rows(path: Path, expected: Path) -> None:
    """Every array is the same to the bit, and so are the digests in the seals."""
    with open_store(path) as one, open_store(expected) as two:
        assert str(one.manifest.arrays) == str(two.manifest.arrays)  # NaN is not NaN
        for (name, values), others in zip(all_arrays(one).items(), all_arrays(two).values(), strict=True):
            assert values.tobytes() == others.tobytes(), name
        for shard in two.sealed_shards():
            assert one.seal(shard).arrays == two.seal(shard).arrays
            assert one.seal(shard).quarantine == two.seal(shard).quarantine
    assert verify(path).ok


# What is written


def test_what_is_made_of_a_dense_float32_store_is_byte_for_byte_what_the_teacher_gives(
    dumped: Dump, tmp_path: Path
) -> None:
    source = dumped(values="float32")
    wanted: list[dict[str, Any]] = [
        {"encoding": "topk", "k": 20},
        {"encoding": "topk", "k": 5, "values": "uint8", "temperatures": (1.0, 3.0)},
        {"encoding": "sample", "draws": 30, "seed": 5},
        {"encoding": "sample", "draws": 7, "temperatures": (2.0,)},
        {"encoding": "dense", "values": "float16"},
        {"encoding": "dense", "values": "uint8"},
    ]
    for index, options in enumerate(wanted):
        temperatures = (1.0, 2.0) if options["encoding"] != "sample" else (1.0,)
        expected = dumped(**{"temperatures": temperatures, **options})
        transcode(source, tmp_path / f"{index}.h5", TranscodeOptions(**options))
        assert_same_rows(tmp_path / f"{index}.h5", expected)


def test_what_is_made_of_hidden_states_is_close_to_what_the_teacher_gives(dumped: Dump, tmp_path: Path) -> None:
    source = dumped(encoding="hidden", values="float32")
    for options in ({"encoding": "topk", "k": 20}, {"encoding": "dense", "values": "float32"}):
        direct = dumped(**options)
        path = tmp_path / f"{options['encoding']}.zarr"
        result = transcode(source, path, TranscodeOptions(**options))
        assert result.notes[0].startswith("its logits come from hidden states: hidden states are exact to float32")
        assert verify(path).ok
        with open_store(path) as one, open_store(direct) as two:
            found, expected = all_arrays(one), all_arrays(two)
            for name in ("values", "lse", "log_tail", "max_logit"):
                if name in found:
                    np.testing.assert_allclose(
                        found[name].astype(float), expected[name].astype(float), rtol=2e-3, atol=2e-3
                    )
            np.testing.assert_array_equal(found["sample_digest"], expected["sample_digest"])
            if "ids" in found:
                assert (found["ids"] == expected["ids"]).mean() > 0.99


def test_hidden_states_become_float16_beside_the_same_head(dumped: Dump, tmp_path: Path) -> None:
    source = dumped(encoding="hidden", values="float32")
    direct = dumped(encoding="hidden")
    transcode(source, tmp_path / "half.zarr", TranscodeOptions(values="float16"))
    assert_same_rows(tmp_path / "half.zarr", direct)
    with open_store(source) as one, open_store(tmp_path / "half.zarr") as two:
        first, second = one.head(), two.head()
        assert first is not None
        assert second is not None
        np.testing.assert_array_equal(first.weight_CW, second.weight_CW)


def test_fewer_entries_are_those_of_a_direct_dump_and_the_tail_takes_what_is_dropped(
    dumped: Dump, tmp_path: Path
) -> None:
    for values in ("float32", "float16"):
        source = dumped(encoding="topk", k=256, values=values)
        direct = dumped(encoding="topk", k=64, values=values, temperatures=(1.0, 2.0))
        path = tmp_path / f"cut-{values}.zarr"
        transcode(source, path, TranscodeOptions(k=64, temperatures=(2.0, 1.0)))
        assert verify(path).ok
        with open_store(path) as one, open_store(direct) as two:
            assert one.manifest.encoding == TopK(64, values)
            found, expected = all_arrays(one), all_arrays(two)
        for name in set(found) - {"lse", "log_tail"}:  # the kept ones are added up apart: other last bits
            assert found[name].tobytes() == expected[name].tobytes(), name
        # a value that is dropped is off by 2^-11 of itself, and the tail by as much of the largest, over T
        bound = 2e-6 if values == "float32" else 2**-11 * float(np.nanmax(-all_values(source))) + 1e-6
        np.testing.assert_allclose(found["log_tail"], expected["log_tail"], rtol=0, atol=bound)
        np.testing.assert_allclose(found["lse"], expected["lse"], rtol=0, atol=1e-6)


def all_values(path: Path) -> np.ndarray[Any, Any]:
    with open_store(path) as store:
        return loaded_values(all_arrays(store))


def test_uint8_values_are_within_their_bound_of_the_float16_ones(dumped: Dump, tmp_path: Path) -> None:
    for options in ({"encoding": "dense"}, {"encoding": "topk", "k": 40}):
        source = dumped(**options)
        path = tmp_path / f"{options['encoding']}-bytes.zarr"
        result = transcode(source, path, TranscodeOptions(values="uint8"))
        assert result.notes[0].startswith("its logits come from float16 values: a ")
        assert verify(path).ok
        with open_store(source) as one, open_store(path) as two:
            old, new = all_arrays(one), all_arrays(two)
        if "ids" in old:
            np.testing.assert_array_equal(old["ids"], new["ids"])
        kept_N = old["status"] == STATUS_OK
        shape = (-1, old["values"].shape[-1])
        values = old["values"][kept_N].reshape(shape).astype(np.float32)
        codes = {
            "values": new["values"][kept_N].reshape(shape),
            "value_range": new["value_range"][kept_N].reshape(-1),
        }
        error = np.abs(loaded_values(codes) - values)
        assert (error <= codes["value_range"][:, None] / 510 * (1 + 2e-4)).all()


def test_bytes_are_taken_over_as_they_are(dumped: Dump, tmp_path: Path) -> None:
    """To quantise them a second time, with a smaller range, would move them a second time."""
    source = dumped(values="uint8")
    transcode(source, tmp_path / "topk.zarr", TranscodeOptions("topk", k=10))
    transcode(tmp_path / "topk.zarr", tmp_path / "fewer.zarr", TranscodeOptions(k=4))
    transcode(source, tmp_path / "warmer.zarr", TranscodeOptions(temperatures=(1.0, 2.0, 5.0)))
    with open_store(source) as store:
        old = all_arrays(store)
    for name in ("topk", "fewer", "warmer"):
        assert verify(tmp_path / f"{name}.zarr").ok
        with open_store(tmp_path / f"{name}.zarr") as store:
            new = all_arrays(store)
        expected = old["values"]
        if name != "warmer":
            expected = np.take_along_axis(old["values"], new["ids"].astype(np.int64), axis=-1)
            expected[old["status"] != STATUS_OK] = 0
        np.testing.assert_array_equal(new["values"], expected)
        np.testing.assert_array_equal(new["value_range"], old["value_range"])


def test_the_manifest_keeps_who_made_the_rows_and_says_what_they_went_through(dumped: Dump, tmp_path: Path) -> None:
    source = dumped()
    first = transcode(source, tmp_path / "topk.zarr", TranscodeOptions("topk", k=8))
    second = transcode(tmp_path / "topk.zarr", tmp_path / "fewer.zarr", TranscodeOptions(k=4, temperatures=(2.0,)))
    with open_store(source) as one, open_store(tmp_path / "fewer.zarr") as two:
        there, manifest = one.manifest, two.manifest
        assert one.content_digest == first.source_digest
    for name in ("num_rows", "num_classes", "shard_rows", "teacher", "corpus", "preprocess", "sequences"):
        assert getattr(manifest, name) == getattr(there, name)
    assert manifest.format_version == "1.1"
    assert manifest.lineage == (
        {"content_digest": first.source_digest, "encoding": Dense().to_json(), "temperatures": [1.0, 2.0]},
        {"content_digest": first.content_digest, "encoding": TopK(8).to_json(), "temperatures": [1.0, 2.0]},
    )
    assert second.source_digest == first.content_digest
    assert manifest.provenance["transcoded_from"] == {"name": "topk.zarr"}
    assert manifest.compressor == "zstd"


# How it is written


@pytest.mark.parametrize("target", ["b.h5", "b.zarr"])
@pytest.mark.parametrize("num_calls", [0, 1, 4])
def test_a_transcoding_that_was_stopped_goes_on_to_the_same_store(tmp_path: Path, target: str, num_calls: int) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=Dense("float32")))
    options = TranscodeOptions("topk", k=3)
    undisturbed = transcode(source, tmp_path / "undisturbed.zarr", options)
    calls: list[int] = []

    def stop(num_rows: int) -> None:
        calls.append(num_rows)
        if len(calls) > num_calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transcode(source, tmp_path / target, options, progress=stop)
    counted: list[int] = []
    result = transcode(source, tmp_path / target, options, progress=counted.append)
    assert sum(counted) == 2 * 22
    assert result.content_digest == undisturbed.content_digest
    assert transcode(source, tmp_path / target, options) == result  # and once more: it is there
    assert verify(tmp_path / target).ok


def test_a_store_that_was_finalized_at_what_is_sealed_stays_at_that(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=Dense("float32")), shards=2)
    assert transcode(source, tmp_path / "b.zarr", TranscodeOptions("topk", k=2)).num_rows == 16
    with open_store(tmp_path / "b.zarr") as store, open_store(source) as there:
        assert store.sealed_shards() == (0, 1)
        assert store.quarantine() == there.quarantine() != []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    other = write_store(tmp_path / "b.zarr", manifest_of(encoding=TopK(3)))
    options = TranscodeOptions("topk", k=3)
    with pytest.raises(MismatchError, match="expected nothing, or this transcoding begun, got another store; give"):
        transcode(source, other, options)
    with pytest.raises(PathError, match="expected a path outside"):
        transcode(source, source / "inside.zarr", options)
    transcode(source, tmp_path / "c.zarr", options)
    with pytest.raises(MismatchError, match=r"expected a run that goes on with this store, got other settings: .*k"):
        transcode(source, tmp_path / "c.zarr", TranscodeOptions("topk", k=2))
    unfinished = write_store(tmp_path / "d.zarr", manifest_of(), finalize=False)
    with pytest.raises(NotSealedError, match="expected a finalized store, got one that is not; finish the dump, or"):
        transcode(unfinished, tmp_path / "e.zarr", options)


def test_a_shard_that_its_seal_does_not_name_is_not_transcoded(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    other = write_store(tmp_path / "b.zarr", manifest_of(temperatures=(1.0, 5.0)))
    (source / "lse" / "c" / "0" / "0").write_bytes((other / "lse" / "c" / "0" / "0").read_bytes())
    with pytest.raises(DamageError, match="array 'lse', shard 0: expected the sealed sha256 to hold, got another"):
        transcode(source, tmp_path / "c.zarr", TranscodeOptions("topk", k=3))


def test_a_hidden_state_that_float16_can_not_hold_is_not_cut_off(tmp_path: Path) -> None:
    rows = np.full((4, 3), 1.0, np.float32)
    rows[2] = 1e6
    np.save(tmp_path / "rows.npy", rows)
    torch.manual_seed(0)
    model = build_model("mlp:3-4-2")
    with torch.no_grad():
        next(model.parameters()).abs_()  # so that the hidden state grows with the row
    torch.save(model.state_dict(), tmp_path / "teacher.pt")
    source = tmp_path / "a.zarr"
    config = DumpConfig(
        models=(str(tmp_path / "teacher.pt"),), arch="mlp:3-4-2", data=str(tmp_path / "rows.npy"), out=str(source),
        encoding="hidden", values="float32", device="cpu",
    )  # fmt: skip
    run(config)
    with pytest.raises(MismatchError, match="row 2: expected a hidden state that float16 holds, got a larger one"):
        transcode(source, tmp_path / "b.zarr", TranscodeOptions(values="float16"))


# What is refused


def refusal(there: Encoding, options: dict[str, Any]) -> None:
    temperatures = (1.0,) if isinstance(there, Sample) else (1.0, 2.0)
    manifest: Manifest = manifest_of(num_classes=9, encoding=there, temperatures=temperatures)
    choose_encoding(manifest, TranscodeOptions(**options), "a.zarr")


@pytest.mark.parametrize(
    ("encoding", "options", "message"),
    [
        (
            Sample(4),
            {"encoding": "topk", "k": 2},
            "a.zarr: expected a store to make topk of, got sample: its draws say",
        ),
        (Sample(4), {"draws": 2}, "a.zarr: expected a store to make sample of, got sample: .*; dump again with the"),
        (TopK(3), {"encoding": "dense"}, "expected a store to make dense of, got topk: the classes that it did not"),
        (TopK(3), {"encoding": "sample", "draws": 2}, "expected a store to make sample of, got topk"),
        (Dense(), {"encoding": "hidden"}, "got dense: hidden states are not in it; choose dense or topk or sample, or"),
        (TopK(3), {"k": 4}, "a.zarr: expected at most the 3 entries that it keeps, got k = 4; use a smaller k"),
        (TopK(3), {"k": 2, "temperatures": (3.0,)}, r"temperatures that the store declares \(1, 2\), got 3; its tail"),
        (TopK(3), {"values": "float32"}, r"expected values no finer than it has \(float16\), got float32; nothing"),
        (Dense("uint8"), {"values": "float16"}, r"expected values no finer than it has \(uint8\), got float16"),
        (Hidden(4), {"encoding": "dense", "values": "float32"}, r"no finer than it has \(float16\), got float32"),
    ],
)
def test_what_the_source_does_not_hold_is_refused(encoding: Encoding, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        refusal(encoding, options)


@pytest.mark.parametrize(
    ("encoding", "options", "message"),
    [
        (Dense(), {"encoding": "topk"}, "k: expected how many entries topk keeps, got none; give --k N"),
        (Dense(), {"encoding": "topk", "k": 10}, r"k: expected at most the number of classes \(9\), got 10"),
        (Dense(), {"encoding": "sample"}, "draws: expected how many sample takes, got none; give --draws N"),
        (Dense(), {"encoding": "sample", "draws": 256}, "draws: expected 1 to 255"),
        (Dense(), {"encoding": "sample", "draws": 2, "values": "float16"}, "values: expected none with sample"),
        (Dense(), {"encoding": "sample", "draws": 2, "temperatures": (1.0, 2.0)}, "temperatures: expected one for"),
        (Dense(), {"values": "uint8", "k": 2}, "k: expected none with dense, got 2; it is of topk: leave it out"),
        (Dense(), {}, "encoding: expected another than 'a.zarr' has, got the same; to pack it otherwise: logitstore"),
        (Dense(), {"encoding": "sparse"}, "encoding: expected dense or topk or sample or hidden, got 'sparse'"),
        (Dense(), {"temperatures": (0.0,)}, "temperatures: expected numbers above 0, got"),
        (Hidden(4, "float32"), {"values": "uint8"}, "values: expected float16 or float32 with hidden, got uint8"),
    ],
)  # fmt: skip
def test_options_that_can_not_be_are_refused(encoding: Encoding, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusal(encoding, options)


# The command


@pytest.fixture
def invoke() -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(logitstore, ["transcode", *map(str, words)], catch_exceptions=False)


def test_the_command_is_found_beside_those_of_the_store(invoke: Callable[..., Result], tmp_path: Path) -> None:
    listing = CliRunner().invoke(logitstore, ["--help"]).stdout
    assert "transcode  Write a finalized store to TARGET in a smaller encoding" in listing
    source = write_store(tmp_path / "a.zarr", manifest_of())
    done = invoke(
        source, tmp_path / "b.h5", "--encoding", "topk", "--k", "3", "--temperature", "2", "--values", "uint8"
    )
    assert done.exit_code == 0
    assert done.stderr == (
        "note: its logits come from float16 values: a centred logit is within 2^-11 of itself, or within 2^-25 where "
        "it is below 2^-14, and one under -65504 reads as -65504\n"
    )
    with open_store(source) as one, open_store(tmp_path / "b.h5") as two:
        assert two.manifest.encoding == TopK(3, "uint8")
        assert two.manifest.temperatures == (2.0,)
        assert done.stdout.startswith(f"{tmp_path / 'b.h5'}: 22 rows, ")
        assert done.stdout.endswith(f" before)\ncontent digest {two.content_digest}, made of {one.content_digest}\n")
    info = json.loads(CliRunner().invoke(logitstore, ["info", str(tmp_path / "b.h5"), "--json"]).stdout)
    assert info["encoding"]["name"] == "topk"
    refused = invoke(tmp_path / "b.h5", tmp_path / "c.zarr", "--encoding", "dense")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"error: {tmp_path / 'b.h5'}: expected a store to make dense of, got topk: ")
    assert invoke(source, tmp_path / "c.zarr", "--k", "3").exit_code == 2


def test_the_command_offers_just_what_there_is() -> None:
    assert set(transcode_cli.ENCODINGS) == set(ENCODINGS)
    assert set(transcode_cli.VALUES) == set(get_args(ValueType))
    assert set(transcode_cli.COMPRESSORS) == set(get_args(Compressor))


def test_a_command_whose_package_is_missing_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        name = "absent"

        def load(self) -> object:
            raise ModuleNotFoundError("No module named 'absent'")

    def entry_points(group: str, name: str = "absent") -> list[Missing]:
        return [Missing()] if (group, name) == (COMMANDS, "absent") else []

    monkeypatch.setattr("storage.cli.entry_points", entry_points)
    assert isinstance(logitstore, WithCommands)
    assert "absent" not in CliRunner().invoke(logitstore, ["--help"]).stdout
    assert "No such command 'absent'" in CliRunner().invoke(logitstore, ["absent"]).stderr


def test_a_result_says_what_it_was_made_of(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=Dense("float32")))
    result = transcode(source, tmp_path / "b.zarr", TranscodeOptions("sample", draws=3))
    assert isinstance(result, TranscodeResult)
    assert (result.num_rows, result.notes) == (22, ())
    with open_store(tmp_path / "b.zarr") as store:
        assert store.manifest.encoding == Sample(3)
        assert store.manifest.temperatures == (1.0,)
