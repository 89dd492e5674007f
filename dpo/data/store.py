"""Tokenised pairs on disk, and the report on the data they come from.

A folder of the cache, named by a hash of what it was made of, holds the tokens of all pairs end to end, their lengths,
their texts and the report; it is memory-mapped, so processes of a node share it. It is filled under a temporary name
and renamed: what bears the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo.errors import UserError
from dpo.types import PreferenceRow, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3
COLUMNS = {
    "lengths": np.int64, "row_numbers": np.int64, "characters": np.int64, "margins": np.float32, "text_sizes": np.int64,
    "prompt_hashes": np.uint64, "targets": np.int64,
}  # fmt: skip
"""Arrays of a folder, a row per pair, each in a file of its name."""


@dataclass
class KindCount:
    """How many rows are of one kind, and the numbers of the first of them.

    Attributes:
        count: Rows of this kind.
        rows: 1-based numbers of up to three of them.
        fate: "bad": refused or dropped; "tie": no pair is made; "cut": cut to length; "kept": kept as they are.
        detail: What was found in the first of them, control characters escaped.
    """

    count: int = 0
    rows: list[int] = field(default_factory=list)
    fate: str = "bad"
    detail: str = ""

    def add(self, row: int, fate: str, detail: str) -> None:
        """Count a row."""
        self.count += 1
        self.fate = fate
        self.detail = self.detail or detail
        self.rows = [*self.rows, row][:EXAMPLES]


@dataclass
class DataReport:
    """What was found in a data set and what became of it; counts, for the log and for the audit.

    Attributes:
        source: The path as given, with its split.
        format: Format of the rows.
        max_length: The limit the counts refer to, in tokens.
        rows_read: Rows of the source after `limit`.
        pairs: Pairs kept.
        kinds: Counts by kind of oddity, each by itself: a row counts under every kind it has.
        prompts_cut: Pairs kept whose prompt lost its start.
        completions_cut: Completions kept that lost their end, and with it their end token.
        prompt_tokens, chosen_tokens, rejected_tokens: Sums over the pairs kept.
        digest: Hash of all token ids and lengths, whatever text, tokenizer or library they come from.
        seconds: Time the tokenisation took, when it was done.
        cache_hit: The pairs came from the cache.
        first_bad: Row, kind and detail of the first bad row, if any.
    """

    source: str = ""
    format: str = ""
    max_length: int = 0
    rows_read: int = 0
    pairs: int = 0
    kinds: dict[str, KindCount] = field(default_factory=dict)
    prompts_cut: int = 0
    completions_cut: int = 0
    prompt_tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    digest: str = ""
    seconds: float = 0.0
    cache_hit: bool = False
    first_bad: str | None = None

    def fate(self, found: KindCount) -> str:
        """Say what became of the rows of a kind."""
        cut = f"cut to {self.max_length} tokens where kept"
        return {"bad": "refused or dropped", "tie": "no pair made", "cut": cut, "kept": "kept"}[found.fate]

    def lines(self) -> list[str]:
        """Say it in a few lines for the log, the summary first, then one line per kind."""
        how = "read from the cache" if self.cache_hit else f"tokenised in {self.seconds:.1f} s"
        lines = [
            f"{self.source}: {self.rows_read:,} rows ({self.format}), {self.pairs:,} pairs kept, {how}; tokens: prompt "
            f"{self.prompt_tokens:,}, chosen {self.chosen_tokens:,}, rejected {self.rejected_tokens:,}"
        ]
        for kind, found in self.kinds.items():
            examples = ", ".join(map(str, found.rows)) + (", ..." if found.count > len(found.rows) else "")
            lines.append(f"  {kind}: {found.count:,}, {self.fate(found)} (row {examples})")
        if self.prompts_cut or self.completions_cut:
            lines.append(
                f"  truncated: prompts at their start: {self.prompts_cut:,}; completions at their end, with the end"
                f" token: {self.completions_cut:,}"
            )
        return lines


class TokenizedPairs:
    """Tokenised pairs in a folder, memory-mapped.

    Attributes:
        lengths: (n, 3) int64: prompt, chosen and rejected tokens of every pair.
        targets: (n, 2) int64: scored tokens of chosen and rejected.
        row_numbers: (n,) int64: the 1-based source row of every pair.
        characters: (n, 2) int64: characters of chosen and rejected before truncation.
        margins: (n,) fp32: by how much the data rates chosen above rejected; NaN where it is silent.
        prompt_hashes: (n,) uint64: of the prompt's ids before truncation: equal for equal prompts.
        tokens: (T,) int32: the ids of all pairs end to end, each pair's prompt, chosen and rejected in turn.
        unscored: (u,) int64: which of them stand in a completion and are not scored, in order.
        starts: (n + 1,) int64: where each pair begins among them, and where the last ends.
        path: The folder.
        key: Its name, the hash of what it was made of.
    """

    def __init__(self, path: Path) -> None:
        """Open a folder written by `prepare_pairs`."""
        self.path, self.key = path, path.name
        columns = {name: np.load(path / f"{name}.npy") for name in COLUMNS}
        self.lengths: np.ndarray = columns["lengths"]
        self.targets: np.ndarray = columns["targets"]
        self.row_numbers: np.ndarray = columns["row_numbers"]
        self.characters: np.ndarray = columns["characters"]
        self.margins: np.ndarray = columns["margins"]
        self.prompt_hashes: np.ndarray = columns["prompt_hashes"]
        self.starts = np.concatenate([[0], self.lengths.sum(axis=1).cumsum()])
        self._text_ends: np.ndarray = columns["text_sizes"].cumsum()
        self.tokens = np.memmap(path / "tokens.bin", dtype=np.int32, mode="r")
        unscored = path / "unscored.bin"  # an empty file cannot be mapped
        self.unscored = np.memmap(unscored, dtype=np.int64, mode="r") if unscored.stat().st_size else np.zeros(0, int)

    @property
    def parts(self) -> list[TokenizedPairs]:
        """The sources it is made of: itself; see `mixture.Mixture`."""
        return [self]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, pair_id: int) -> TokenizedPair:
        """Return one pair; its arrays are read-only views of the file."""
        if not 0 <= pair_id < len(self):
            raise IndexError(f"pair {pair_id} of {len(self)}")
        start = int(self.starts[pair_id])
        prompt, chosen, rejected = (int(length) for length in self.lengths[pair_id])
        tokens, margin = self.tokens[start : start + prompt + chosen + rejected], float(self.margins[pair_id])
        ids = tokens[:prompt], tokens[prompt : prompt + chosen], tokens[prompt + chosen :]
        first, last = np.searchsorted(self.unscored, (start, start + len(tokens)))
        if first == last:
            return TokenizedPair(pair_id, *ids, margin)
        scored = np.ones(len(tokens), dtype=bool)
        scored[self.unscored[first:last] - start] = False
        return TokenizedPair(pair_id, *ids, margin, scored[prompt : prompt + chosen], scored[prompt + chosen :])

    def origin(self, pair_id: int) -> str:
        """Name the source row of a pair."""
        return f"row {self.row_numbers[pair_id]}"

    def texts(self, pair_id: int) -> PreferenceRow | None:
        """Return a pair as it was before tokenisation, nothing cut: text, or messages.

        None where it was streamed: of those the first pair, and now and then a further one, keeps its text.
        """
        if not 0 <= pair_id < len(self):
            raise IndexError(f"pair {pair_id} of {len(self)}")
        start = int(self._text_ends[pair_id - 1]) if pair_id else 0
        with open(self.path / "texts.bin", "rb") as stream:
            stream.seek(start)
            stored = stream.read(int(self._text_ends[pair_id]) - start)
        if not stored:
            return None
        prompt, chosen, rejected, tools, kwargs = json.loads(stored)
        margin = None if np.isnan(self.margins[pair_id]) else float(self.margins[pair_id])
        return PreferenceRow(prompt, chosen, rejected, int(self.row_numbers[pair_id]), margin, tools, kwargs)


class DataSet(NamedTuple):
    """A source, tokenised.

    Attributes:
        name: What to call it.
        role: "train" or "validation".
        pairs: Its pairs.
        report: Of their tokenisation.
    """

    name: str
    role: str
    pairs: TokenizedPairs
    report: DataReport


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_folder(cache_dir: str | Path) -> Path:
    """Return the folder for tokenised data, made if need be.

    Raises:
        UserError: It cannot be made or not be written to.
    """
    try:
        folder = Path(os.path.expanduser(cache_dir))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot make the cache folder {cache_dir}: {error.strerror or error}"
        raise UserError(f"{what}; set data.cache_dir") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the cache folder {folder} cannot be written to; set data.cache_dir")
    return folder


def content_key(rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase, settings: tuple[Any, ...]) -> str:
    """Hash everything the ids depend on: settings, tokenizer, and the rows by their content, wherever they lie."""
    digest = hashlib.sha256()
    libraries = [version(name) for name in ("transformers", "tokenizers")]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = backend.to_str() if backend else json.dumps(tokenizer.get_vocab())
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    template = getattr(tokenizer, "chat_template", None)
    for item in (libraries, settings, type(tokenizer).__name__, own, special, template):
        digest.update(json.dumps(item, default=str).encode())
    for row in rows:
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()[:32]


def temporary(folder: Path) -> Path:
    """Name the folder in which this process prepares `folder`."""
    return folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left of `folder`; called with its lock held."""
    for leftover in [folder, *folder.parent.glob(f"{folder.name}.tmp-{socket.gethostname()}-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def publish(report: DataReport, folder: Path) -> None:
    """Complete the temporary folder with its report and give it its final name."""
    whole = temporary(folder)
    (whole / "report.json").write_text(json.dumps(asdict(report)))
    try:
        os.rename(whole, folder)
    except OSError:
        # Another machine may have been first, where the file system keeps no locks between machines.
        if read_report(folder) is None:
            raise
        shutil.rmtree(whole, ignore_errors=True)


def read_report(folder: Path) -> DataReport | None:
    """Read the report of a whole cache entry, None where there is none."""
    try:
        stored = json.loads((folder / "report.json").read_text())
        tokens = stored["prompt_tokens"] + stored["chosen_tokens"] + stored["rejected_tokens"]
        if (folder / "tokens.bin").stat().st_size != 4 * tokens:
            return None
        kinds = {kind: KindCount(**found) for kind, found in stored.pop("kinds").items()}
        return DataReport(**{**stored, "kinds": kinds, "cache_hit": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None
