"""Rows that stay on the disk, and are read and encoded when they are needed: a million cost no more than a thousand."""

import csv
import functools
import glob
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from chat import UserError, loading

LOOK = 1000  # rows that are looked at before a run begins


class Rows(Dataset):
    """Environments of rows, such as those of a table on the disk, each made when it is asked for.

    Raises a UserError for a malformed row: of the first ones at once, of others when they are asked for.
    """

    def __init__(self, rows: Any, make: Any, place: Any, read: Any = None, numbers: Any = None):
        """`make(row, unread)` gives an environment, `place(i)` says where row i stands, `read` makes an object of it.

        `numbers`: of the rows that are not blank.
        """
        self.rows, self.make, self.place, self.read = rows, make, place, read
        self.numbers = np.arange(len(rows)) if numbers is None else numbers
        self.unread: set[str] = set()  # columns that nothing has read, so far
        for i in range(min(len(self), LOOK)):
            self[i]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        number = int(self.numbers[index])
        try:
            row = self.rows[number]
            return self.make(self.read(row) if self.read else row, self.unread)
        except UserError as error:
            raise UserError(f"{self.place(number)}: {error}") from None

    def digest(self) -> str:
        """What tells it from other data. Of a table on the disk its files are read, which takes no memory."""
        files = getattr(self.rows, "cache_files", [])
        if not files or getattr(self.rows, "_indices", None) is not None:  # in memory, or a selection
            return hashlib.sha256(repr(list(self.rows)).encode(errors="replace")).hexdigest()
        sha = hashlib.sha256()
        for path in [file["filename"] for file in files]:
            with open(path, "rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()


def parts_of(dataset: Any) -> list[Any]:
    """What a part of a dataset, or a mixture, is made of."""
    if isinstance(dataset, ConcatDataset):
        return [part for each in dataset.datasets for part in parts_of(each)]
    return parts_of(dataset.dataset) if isinstance(dataset, Subset) else [dataset]


def unread_columns(*datasets: Any) -> list[str]:
    """Names of columns that no row so far has been read from."""
    tables = [part for dataset in datasets for part in parts_of(dataset) if isinstance(part, Rows)]
    return sorted(set().union(*(table.unread for table in tables)))


def load_files(name: str, make: Any) -> Rows:
    """Files of one kind, which stay on the disk. A line of .jsonl may hold any JSON; other columns have one type."""
    import datasets

    paths = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
    if not paths or Path(paths[0]).is_dir():
        raise UserError(f"{name}: {'a folder, not a file' if paths else 'no such file'}")
    if not any(Path(path).stat().st_size for path in paths):
        raise UserError(f"{name}: no rows")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    kind = Path(name).suffix[1:]
    options: dict[str, Any] = {"data_files": [glob.escape(path) for path in paths], "split": "train"}
    with loading(f"dataset {name}"):
        if kind == "csv":  # text as it stands: 007 is no 7, and NA is not nothing
            with open(paths[0], newline="", encoding="utf-8-sig") as file:
                columns = dict.fromkeys(next(csv.reader(file)), datasets.Value("string"))
            options |= {"features": datasets.Features(columns), "keep_default_na": False, "na_values": [""]}
        table: Any = datasets.load_dataset("text" if kind == "jsonl" else kind, **options)
        if kind != "jsonl":
            return Rows(undecoded(table), make, functools.partial(row_of, name), without_none)
        filled = [np.fromiter((not line.isspace() for line in lines_of(path)), dtype=bool) for path in paths]
        ends = np.cumsum([len(lines) for lines in filled])
        if len(table) != ends[-1]:  # a file was edited, and its time is the old one
            table = datasets.load_dataset("text", download_mode="force_redownload", **options)
    place = functools.partial(line_of, paths, ends)
    return Rows(table, make, place, read_line, np.flatnonzero(np.concatenate(filled)))


def undecoded(table: Any) -> Any:
    """Without opening the images and sounds of a table: nothing reads them."""
    for column, feature in table.features.items():
        if hasattr(feature, "decode"):
            table = table.cast_column(column, type(feature)(decode=False))
    return table


def lines_of(path: str) -> Generator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from file


def row_of(name: str, row: int) -> str:
    return f"{name}, row {row}"


def line_of(paths: list[str], ends: Any, row: int) -> str:
    """File and line of a row; `ends` are the rows at which the files end."""
    n = int(np.searchsorted(ends, row, side="right"))
    return f"{paths[n]}:{row - (int(ends[n - 1]) if n else 0) + 1}"


def read_line(row: dict[str, str]) -> Any:
    try:
        value = json.loads(row["text"].removeprefix("\ufeff"))
        json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a line of JSON ({error})") from None
    return value


def without_none(value: Any) -> Any:
    """A table fills its gaps with None, also inside of tools and tool calls."""
    if isinstance(value, dict):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


class Encoded:
    """What `encode` makes of a dataset's environments, when it is asked for: a million need not wait for it.

    A row for which it raises a UserError is left out, and one that its number draws takes its place: what a step
    trains on depends on nothing but the step.
    """

    def __init__(self, dataset: Any, encode: Callable[[Any], Any]):
        self.dataset, self.dropped = dataset, {}  # row -> why
        self.seen = np.zeros(len(dataset), dtype=bool)
        self.encode = functools.lru_cache(maxsize=4 * LOOK)(lambda row: encode(dataset[row]))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        return self.encode(self.find(row))

    def can_use(self, row: int) -> bool:
        self.seen[row] = True
        if row not in self.dropped:
            try:
                self.encode(row)
            except UserError as error:
                self.dropped[row] = str(error)
            except Exception as error:  # of the user's code, such as its get_target
                raise UserError(f"row {row}: {type(error).__name__}: {error}") from error
        return row not in self.dropped

    def find(self, row: int) -> int:
        """The row, or one in its place. Raises a UserError when hardly any can be used."""
        draw = random.Random(row)
        for _ in range(LOOK):
            if self.can_use(row):
                return row
            row = draw.randrange(len(self))
        raise UserError(f"no row can be used: {self.report()}")

    def look(self, count: int) -> list[int]:
        """Which of the first rows are not left out; if all are, one in their place, or a UserError."""
        return [row for row in range(min(count, len(self))) if self.can_use(row)] or [self.find(0)]

    def report(self) -> str:
        """How many rows were left out so far, and the most frequent reasons; "": none."""
        if not self.dropped:
            return ""
        reasons = Counter(self.dropped.values()).most_common(3)
        words = "; ".join(f"{count:,} x {reason}" for reason, count in reasons)
        return (
            f"dropped {len(self.dropped):,} of {self.seen.sum():,} rows, the first is row {min(self.dropped)}: {words}"
        )


def ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any]:
    """`function` of each item, the next one computed by a thread while the caller works with this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ready: Any = None
        for item in items:
            ready, before = pool.submit(function, item), ready
            if before is not None:
                yield before.result()
        if ready is not None:
            yield ready.result()
