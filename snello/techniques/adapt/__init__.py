"""Adapt: a small correction of a frozen model learns a task. Options, and which linears they mean; no torch here.

`lora` puts the correction beside the frozen linears, `prompt` puts rows that learn before a text instead, `train`
teaches either of them answers to prompts and scores them, `classify` teaches an encoder labels (there also by its head
alone, or all weights), `merge` adds a correction to the weights. PEFT's files are read and written by `models.adapter`:
the engine runs adapters too. Whether an adapter is worth publishing is judged above, in `optimize.adapt`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from snello.errors import SnelloError, Unsupported
from snello.models.spec import Spec, linear_names
from snello.techniques.units import check_plain_blocks
from snello.training.options import check_choice, check_positive

WITHIN, WITHOUT = ("lora", "prompt"), ("lora", "head", "full")  # of models that continue text, and of others
ATTENTION, FFN = ("q", "k", "v", "o"), ("gate", "up", "down")
Method = Literal["lora", "prompt", "head", "full"]
RATES: dict[str, float] = {"lora": 1e-3, "prompt": 3e-2, "head": 1e-3, "full": 1e-4}
PARTS = (*ATTENTION, *FFN)
GROUPS = {"attention": ATTENTION, "ffn": FFN, "all-linear": PARTS}  # the last is PEFT's word


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Learn a task with a correction of low rank beside each linear of a frozen model (LoRA).

    Formula: y = W x + alpha / rank * B (A x), with A of rank x K and B of N x rank, which begins as zeros: before the
    first step the adapted model is the base, to the bit. weight_decomposed (DoRA): y = m (W + alpha / rank * B A) x /
    |W + alpha / rank * B A|, where each output's length m, at first |W|, learns apart from its direction.
    method=prompt instead learns the embeddings of virtual_tokens that stand before every text, and no weight changes.

    When it hurts: on examples unlike the work to come. An adapter that does not beat its base on examples that it has
    not seen is not written.

    Papers: LoRA (Hu et al. 2021), arXiv:2106.09685; rank-stabilized, arXiv:2312.03732; DoRA,
    arXiv:2402.09353; prompt tuning (Lester et al. 2021), arXiv:2104.08691.
    """

    method: Method = field(
        default="lora",
        metadata={
            "help": "What learns: lora; prompt: rows before the text; of an encoder head (the rest stays), or full."
        },
    )
    virtual_tokens: int = field(default=20, metadata={"help": "Rows that method=prompt puts before every text."})
    beginning: str = field(
        default="", metadata={"help": "What they begin as: this text's embeddings; none: tokens of the examples."}
    )
    rank: int = field(default=8, metadata={"help": "Columns of B and rows of A: how much can be learned."})
    alpha: float = field(default=16.0, metadata={"help": "The correction counts alpha / rank."})
    rank_stabilized: bool = field(
        default=False, metadata={"help": "It counts alpha / sqrt(rank): a large rank learns no slower (rsLoRA)."}
    )
    weight_decomposed: bool = field(
        default=False,
        metadata={"help": "The length of each output's weights learns apart from their direction (DoRA); runs merged."},
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Share of the correction's inputs that is left out, at random."}
    )
    targets: str = field(
        default="attention,ffn", metadata={"help": "Linears: attention, ffn, all-linear, or q,k,v,o,gate,up,down."}
    )
    rate: float | None = field(
        default=None,
        metadata={
            "help": "The largest learning rate, after a twentieth of the steps; none: 1e-3, full 1e-4, prompt 3e-2."
        },
    )
    epochs: float = field(default=3.0, metadata={"help": "Passes over the examples."})
    batch: int = field(default=16, metadata={"help": "Examples in one update."})

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "virtual_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SnelloError(f"{name}={value!r} is not a whole number of at least 1", f"leave {name} out")
        check_choice("method", self.method, get_args(Method))
        for name in ("alpha", "rate", "epochs"):
            if getattr(self, name) is not None or name != "rate":
                check_positive(name, getattr(self, name))
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise SnelloError(f"dropout={self.dropout!r} is not in 0..1", "dropout=0.05 is usual")
        for name in ("rank_stabilized", "weight_decomposed"):
            if not isinstance(getattr(self, name), bool):
                raise SnelloError(f"{name}={getattr(self, name)!r} is not an option of adapt", "on or off: a bool")
        self.parts()

    def parts(self) -> tuple[str, ...]:
        """The kinds of linears that are corrected, in the order of computation."""
        words = [word.strip() for word in self.targets.split(",")] if isinstance(self.targets, str) else [""]
        wanted = {part for word in words for part in GROUPS.get(word, (word,))}
        if not wanted <= set(PARTS):
            raise SnelloError(f"targets={self.targets!r} are not linears", f"some of {', '.join((*GROUPS, *PARTS))}")
        return tuple(part for part in PARTS if part in wanted)

    @property
    def largest_rate(self) -> float:
        return RATES[self.method] if self.rate is None else self.rate

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def linears(self, spec: Spec) -> list[str]:
        """Canonical names of what is corrected in this model.

        Raises:
            Unsupported: this model cannot be adapted.
        """
        check_plain_blocks(spec, "adapt")
        if not spec.causal and spec.task != "sequence-classification":
            raise Unsupported(f"adapt: a {spec.task} model", "models that continue text, and classifiers")
        if self.method not in (WITHIN if spec.causal else WITHOUT):
            kind = "a model that continues text" if spec.causal else "an encoder"
            raise Unsupported(f"adapt: method={self.method} of {kind}", "method=lora")
        if self.method == "prompt":
            return []
        parts = self.parts()
        names = [n for n in linear_names(spec) if n.startswith("layers.") and n.rpartition(".")[2] in parts]
        names += ["head.pooler"] if spec.head.pooler is not None else []
        if not names:
            raise Unsupported(f"adapt: this model has no linear {self.targets}", "targets=attention")
        return names
