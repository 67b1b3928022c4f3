"""Folders of data files: shards of one split, a clone of a hub data set, or what `save_to_disk` wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from trimtab.core.errors import DataError
from trimtab.data.files import FILE_TYPES

_SPLIT = re.compile(r"(?:\A|[-_.])(train|training|validation|valid|val|dev|test|eval)(?=[-_.\d]|\Z)", re.IGNORECASE)
"""The word of a name that says the split: "train-0.jsonl", "data_train.jsonl"."""
_SAME_SPLIT = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)")
_UNREAD = frozenset({".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".lz4", ".xls", ".xlsx", ".pkl",
                     ".pickle", ".feather", ".orc", ".avro"})  # fmt: skip
"""Types of files that hold data and are not read."""
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


def files_in(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder in the order of their names, or those of `split` if there are several splits.

    Raises DataError if there are none, if they are of several types, if there are several splits and `split` does not
    name one of them, or if a shard is missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return files_in(folder / _chosen(folder, splits, split), None)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise DataError(
                "the saved data set keeps its order in a file of its own, which is not read",
                where=str(folder),
                fix="save it again with data.flatten_indices().save_to_disk(FOLDER), or with data.to_parquet(FILE)",
            )
        return [folder / shard["filename"] for shard in state["_data_files"]]
    files = [path for path in folder.rglob("*") if not _is_aside(path.relative_to(folder)) and path.is_file()]
    found = [path for path in files if path.name.lower().endswith(FILE_TYPES)]
    if not found:
        raise DataError(
            f"there is no data file in the folder {str(folder)!r}",
            where=str(folder),
            fix=f"name a folder with files of one of the types {', '.join(FILE_TYPES)}",
        )
    by_split: dict[str, list[Path]] = {}
    for path in sorted(found):
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    chosen = _chosen(folder, list(by_split), split)
    paths = by_split[chosen]
    others = [path for path in files if path not in found and _split_of(path.relative_to(folder)) in (chosen, "")]
    _refuse_unread(folder, paths, others)
    kinds = sorted({path.name.lower().partition(".")[2].removesuffix(".gz").rpartition(".")[2] for path in paths})
    if len(kinds) > 1:
        raise DataError(
            f"the folder holds files of several types: {', '.join(kinds)}",
            where=str(folder),
            fix=f"name those that are meant, for instance {folder}/*.{kinds[0]}",
        )
    _refuse_missing_shards(folder, paths)
    return paths


def _is_aside(path: Path) -> bool:
    """Whether a file is hidden or about the data."""
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return hidden or path.name in _ABOUT or path.name.endswith(".card.json")


def _refuse_unread(folder: Path, paths: Sequence[Path], others: Sequence[Path]) -> None:
    """Raises DataError if one of the other files is data as well: by its type, or as a text file with the name of a
    shard."""
    shards = {(path.parent, _without_digits(path)) for path in paths}
    for path in sorted(others):
        like_a_shard = path.suffix.lower() in (".txt", "") and (path.parent, _without_digits(path)) in shards
        if path.suffix.lower() in _UNREAD or like_a_shard:
            raise DataError(
                f"the folder holds {path.name!r} too, which is of no type that is read",
                where=str(folder),
                fix=f"unpack or convert it, or name the files that are meant, for instance {folder}/*{paths[0].suffix}",
            )


def _without_digits(path: Path) -> str:
    return re.sub(r"\d+", "#", path.name.partition(".")[0])


def _split_of(path: Path) -> str:
    """The split that a file belongs to by its name or by that of its folder; "" if neither names one."""
    for name in (path.name, *reversed(path.parent.parts)):
        if found := _SPLIT.search(name):
            name = found[1].lower()
            return _SAME_SPLIT.get(name, name)
    return ""


def _chosen(folder: Path, splits: Sequence[str], wanted: str | None) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted in splits:
        return str(wanted)
    named = [name or "(files that name none)" for name in splits]
    raise DataError(
        f"the folder holds the splits {', '.join(named)}" + (f", not {wanted!r}" if wanted else ""),
        where=str(folder),
        fix=f"say which one: {folder}?split={next((name for name in splits if name), 'train')}",
    )


def _refuse_missing_shards(folder: Path, paths: Sequence[Path]) -> None:
    shards = [found for path in paths if (found := _SHARD.fullmatch(path.name))]
    for begin, of, end in {(s[1], s[3], s[4]) for s in shards}:
        there = {int(s[2]) for s in shards if (s[1], s[3], s[4]) == (begin, of, end)}
        missing = sorted(set(range(int(of))) - there)
        if missing:
            raise DataError(
                f"of {int(of)} shards {begin}{end} there are {len(there)}; number {missing[0]} is missing",
                where=str(folder),
                fix="copy or download the others too, or name single files",
            )
