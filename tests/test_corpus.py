"""Malformed records, files, tables, mixes and recipes: each is refused by its own error, with its place and the reason."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from align_ti.config import Data, Recipe, Source, read_recipe
from align_ti.data.checking import refuse_too_many
from align_ti.data.mixing import read_mixture
from align_ti.data.roles import encode
from align_ti.data.sources import Refused, image_root, read_conversations, read_source
from align_ti.digits.models import build_processor
from align_ti.errors import AlignTIError, ConfigError, DataError

PROCESSOR = build_processor()
GOOD = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}


def corpus(name: str) -> list[Any]:
    cases = yaml.safe_load((Path(__file__).parent / "corpus" / f"{name}.yaml").read_text(encoding="utf-8"))
    return [pytest.param(case, id=case["name"]) for case in cases]


RECORDS, FILES, TABLES, MIXES, RECIPES = map(corpus, ("records", "files", "tables", "mixing", "recipes"))


def encoded(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture = Image.effect_noise((48, 48), 50).convert("RGB")
    picture.save(file, form, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header tells a size, with hardly any data."""
    content = b""
    for kind, data in (
        (b"IHDR", width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"),
        (b"IDAT", zlib.compress(b"\0")),
    ):
        content += len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind of image that is none, and links that lead out."""
    outside = tmp_path_factory.mktemp("outside")
    root = tmp_path_factory.mktemp("root")
    good = encoded("PNG")
    damaged = good[:100] + bytes(200) + good[300:]
    for name, content in {
        "a.png": good,
        "cut.png": good[:60],
        "cut.jpg": encoded("JPEG")[:-400],
        "cut.webp": encoded("WEBP")[:-200],
        "header.gif": encoded("GIF")[:13],
        "damaged.png": damaged,
        "flat.png": png_of_size(0, 48),
        "bomb.png": png_of_size(60000, 60000),
        "text.png": b"no image",
        "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "empty.png": b"",
    }.items():
        (root / name).write_bytes(content)
    (root / "sub").mkdir()
    for target in (outside / "b.png", outside / "a.png"):
        target.write_bytes(good)
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "linked").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "dangling.png").symlink_to(root / "gone.png")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


def refused(
    case: dict[str, Any], kind: type[AlignTIError], caught: pytest.ExceptionInfo[AlignTIError], *places: str
) -> None:
    """The error is of exactly this class and has the place and every expected piece."""
    assert caught.type is kind
    message = str(caught.value)
    for piece in (*places, *case["expects"]):
        assert piece in message, f"{piece!r} is missing in: {message}"
    assert "Traceback" not in message and len(message) < 1500


def through(stage: str, source: Source) -> None:
    for record in read_source(source, image_root(source)):
        if stage == "open":
            record.pictures()
        elif stage == "encode":
            encode(record, PROCESSOR)


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
@pytest.mark.parametrize("case", RECORDS)
def test_records(case, lines, folder):
    # A good record before it, in the same format, so that the number in the message is tested too.
    good = {"messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}}
    good |= {"prompt_completion": {"prompt": "Q", "completion": "A"}}
    good |= {
        "plain": {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}],
        }
    }
    both = [good.get(case.get("format", ""), GOOD), case["record"]]
    path = folder / ("data.jsonl" if lines else "data.json")
    path.write_text("\n".join(map(json.dumps, both)) if lines else json.dumps(both), encoding="utf-8")
    with pytest.raises(AlignTIError) as caught:
        through(case.get("stage", "read"), Source(path=str(path), format=case.get("format", "auto")))
    refused(case, DataError, caught, f"{path}, {'line' if lines else 'record'} 2")


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
    path = tmp_path / case["file"]
    path.parent.mkdir(exist_ok=True) if path.parent.parent == tmp_path else None
    if case.get("folder"):
        path.mkdir()
    elif "hex" in case:
        path.write_bytes(bytes.fromhex(case["hex"]))
    elif "repeat" in case:
        path.write_text(case["repeat"][0] * case["repeat"][1])
    elif "content" in case:
        path.write_text(case["content"].replace("{good}", json.dumps(GOOD)))
    read = tmp_path / case.get("read", case["file"])
    with pytest.raises(AlignTIError) as caught:
        read_conversations(read)
    refused(case, DataError, caught, str(read))


def with_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: {"PNG": encoded("PNG"), "CUT": encoded("PNG")[:60]}.get(one, one.encode())
            if name == "bytes" and one is not None
            else with_bytes(one)
            for name, one in value.items()
        }
    return [with_bytes(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", TABLES)
def test_tables(case, tmp_path):
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list(with_bytes(case["rows"])).to_parquet(path)
    with pytest.raises(AlignTIError) as caught:
        through(case.get("stage", "read"), Source(path=str(path)))
    refused(case, DataError, caught, f"{path}, row {case.get('bad', len(case['rows']))}")


@pytest.mark.parametrize("case", MIXES)
def test_mixes(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictured = {
        "image": "x.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}],
    }
    for name, records in {
        "three": [GOOD] * 3,
        "ten": [GOOD] * 10,
        "bad": [GOOD, {"conversations": []}],
        "empty": [],
        "pictured": [pictured],
    }.items():
        Path(f"{name}.json").write_text(json.dumps(records))
    Path("broken.json").write_text("[{")
    Path("notes.txt").write_text("notes")
    Path("pictures").mkdir()
    for name in ("x.png", "x.gif"):
        Path("pictures", name).write_bytes(encoded(name[2:].upper()))

    def read() -> None:
        data = Data(**case["data"])
        mixture = read_mixture(data)
        refuse_too_many(mixture.refused, sum(source.records for source in mixture.sources), data.max_skipped)

    with pytest.raises(AlignTIError) as caught:
        read()
    refused(case, DataError, caught)


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case, tmp_path):
    path = tmp_path / "recipe.yaml"
    content: dict[str, Any] = {
        "out": "x",
        "student": {"path": "s"},
        "teacher": {"path": "t"},
        "data": {"train": "d.json"},
    }
    for name, value in case.get("set", {}).items():
        *sections, key = name.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    path.write_text(case.get("text", yaml.safe_dump(content)))
    with pytest.raises(AlignTIError) as caught:
        read_recipe(path)
    refused(case, ConfigError, caught, str(path))


def test_the_whole_corpus_in_one_file_is_skipped_record_by_record(folder):
    cases = [case.values[0] for case in RECORDS]
    wanted = [case for case in cases if case.get("stage", "read") == "read" and "format" not in case]
    path, found = folder / "all.jsonl", []
    path.write_text("\n".join(json.dumps(case["record"]) for case in wanted) + "\n" + json.dumps(GOOD))
    source = Source(path=str(path))
    assert len(read_source(source, image_root(source), found.append)) == 1
    assert [one.place for one in found] == [f"{path}, line {number + 1}" for number in range(len(wanted))]
    assert all(isinstance(one, Refused) for one in found)
    for one, case in zip(found, wanted, strict=True):
        assert all(piece in one.reason for piece in case["expects"]), case["name"]


def test_the_corpus_is_broad():
    files = [[case.values[0] for case in part] for part in (RECORDS, FILES, TABLES, MIXES, RECIPES)]
    every = [case for part in files for case in part]
    told = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    assert len(every) >= 150 and f"holds {len(every)} malformed" in told
    assert all(len({case["name"] for case in part}) == len(part) for part in files)
    assert len({json.dumps(case, sort_keys=True, default=str) for case in every}) == len(every)
    assert all(case["expects"] for case in every)
    assert Recipe.model_validate(
        {"out": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "d.json"}}
    )
