"""What a family is: data.

A `Family` says which `architectures` it serves, how its config.json becomes a `Spec`, and under which names its
checkpoint keeps each canonical parameter. The names are templates with `{i}` for the layer; they are expanded to
exact names once, and nothing is ever matched by substring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from snello.models.arrangement import PLAIN, Arrangement
from snello.models.families.config import Config
from snello.models.families.convolutions import STEM, convolving_layers
from snello.models.spec import Attention, Spec, Task

SUFFIXES = ("weight", "bias")


HEADED, HEADLESS = "ForCausalLM", "Model"  # how a decoder's architecture ends with its head, and without


@dataclass(frozen=True, kw_only=True)
class ExpertStems:
    """How checkpoints name the experts of a layer: each matrix apart, or all of a layer in one tensor.

    `router`, and the linears of expert `{e}` by part, are stems; `fused_router` is a stem too, while the tensors of
    `fused` (whole names, the parts that each stacks for one expert after the other) have no ending.
    """

    router: str
    apart: Mapping[str, str]
    fused_router: str
    fused: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of families.

    `stems` maps canonical stems ("layers.{i}.attention.q") to the checkpoint's; ".weight" and ".bias" follow both.
    `heads` are the stems of each task's head; those of other tasks are dropped. `parameters` are single parameters
    whose names do not follow. `copies` are tensors that repeat a canonical parameter and must equal it. `fused`
    maps a stem of the checkpoint to the canonical stems that are stacked in it, row after row, or head by head where
    it is one of `by_head`. `transposed` are stems of the checkpoint that keep (inputs, outputs). `base` is the prefix
    that a headless save leaves out. `renamed` are (new, old) endings in old checkpoints. `ignored` are names that
    say nothing new.
    """

    name: str  # config.json's model_type
    architectures: Mapping[str, Task]
    spec: Callable[[Config, Task], Spec]
    stems: Mapping[str, str]
    heads: Mapping[Task, Mapping[str, str]]
    parameters: Mapping[Task, Mapping[str, str]] = field(default_factory=dict)
    copies: Mapping[Task, Mapping[str, str]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    base: str
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    harmless: frozenset[str] = frozenset()
    experts: ExpertStems | None = None

    @property
    def tasks(self) -> list[Task]:
        return list(dict.fromkeys(self.architectures.values()))

    @property
    def embedding(self) -> str | None:
        """The architecture that config.json names where a checkpoint embeds; None: it cannot say so."""
        for name, task in self.architectures.items():
            if task == "embedding":
                return name
            if name.endswith(HEADED):
                return name.removesuffix(HEADED) + HEADLESS
        return None


@dataclass(frozen=True)
class Source:
    """Where a canonical parameter lies: a whole tensor (under any one of these names), or some rows of one.

    `stacked` are the canonical parameters that share the tensor, in the order of their rows.
    """

    names: tuple[str, ...]
    stacked: tuple[str, ...] = ()
    arrangement: Arrangement = PLAIN


@dataclass(frozen=True)
class Names:
    """The exact names of one family in one checkpoint."""

    sources: Mapping[str, Source]  # by canonical parameter
    copies: Mapping[str, str]  # stored name -> canonical parameter that it repeats
    ignored: frozenset[str]


def names_for(family: Family, spec: Spec, *, has_base: bool, fused_experts: bool = False) -> Names:
    """Expands the templates of a family for this many layers and this task."""
    names = _Expansion(family, spec, has_base)
    sources = names.whole({**family.stems, **family.heads.get(spec.task, {})})
    for stored, parts in family.fused.items():
        sources |= names.stacked(stored, parts)
    if family.experts is not None:
        sources |= names.experts(family.experts, fused=fused_experts)
    for index in convolving_layers(spec):
        sources |= names.convolution(index)
    for canonical, stored in family.parameters.get(spec.task, {}).items():
        sources[canonical] = Source(names.spellings(stored))
    copies = {
        spelling: canonical
        for stored, canonical in family.copies.get(spec.task, {}).items()
        for spelling in names.spellings(stored)
    }
    ignored = names.exact(family.ignored)
    for task, head in family.heads.items():
        others = [f"{stem}.{suffix}" for stem in head.values() for suffix in SUFFIXES] if task != spec.task else []
        others += [*family.parameters.get(task, {}).values(), *family.copies.get(task, {})] if task != spec.task else []
        ignored |= names.exact(others)
    used = {name for source in sources.values() for name in source.names}
    return Names(sources, copies, frozenset(ignored - used))


@dataclass(frozen=True)
class _Expansion:
    family: Family
    spec: Spec
    has_base: bool

    def whole(self, stems: Mapping[str, str]) -> dict[str, Source]:
        return {
            f"{at(canonical, index)}.{suffix}": Source(
                self.spellings(f"{at(stored, index)}.{suffix}"), arrangement=self.arrangement(stored, index)
            )
            for canonical, stored in stems.items()
            for index in self.indices(stored)
            for suffix in SUFFIXES
        }

    def stacked(self, stored: str, parts: tuple[str, ...]) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for index in self.indices(stored):
            for suffix in SUFFIXES:
                exact = tuple(f"{at(part, index)}.{suffix}" for part in parts)
                source = Source(self.spellings(f"{at(stored, index)}.{suffix}"), exact, self.arrangement(stored, index))
                found |= dict.fromkeys(exact, source)
        return found

    def experts(self, stems: ExpertStems, *, fused: bool) -> dict[str, Source]:
        """The router and the experts of every layer that has them."""
        found: dict[str, Source] = {}
        for index, layer in enumerate(self.spec.layers):
            if layer.feed_forward.experts is None:
                continue
            router = at(stems.fused_router if fused else stems.router, index)
            found[f"layers.{index}.ffn.router.weight"] = Source(self.spellings(f"{router}.weight"))
            count = layer.feed_forward.experts.num_experts
            found |= self.in_one(stems, index, count) if fused else self.apart(stems, index, count)
        return found

    def apart(self, stems: ExpertStems, index: int, count: int) -> dict[str, Source]:
        return {
            f"layers.{index}.ffn.experts.{number}.{part}.weight": Source(
                self.spellings(at(stem, index).replace("{e}", str(number)) + ".weight")
            )
            for number in range(count)
            for part, stem in stems.apart.items()
        }

    def in_one(self, stems: ExpertStems, index: int, count: int) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for stored, parts in stems.fused.items():
            numbers = range(count)
            stacked = tuple(
                f"layers.{index}.ffn.experts.{number}.{part}.weight" for number in numbers for part in parts
            )
            source = Source(self.spellings(at(stored, index)), stacked, Arrangement(experts=count))
            found |= dict.fromkeys(stacked, source)
        return found

    def convolution(self, index: int) -> dict[str, Source]:
        """What stands in the place of this layer's attention; under the names of Transformers' LFM2."""
        stem, own = at(STEM, index), f"layers.{index}.attention"
        found: dict[str, Source] = {}
        for suffix in SUFFIXES:
            joined = tuple(f"{own}.{part}.{suffix}" for part in ("b", "c", "x"))
            found |= dict.fromkeys(joined, Source(self.spellings(f"{stem}.in_proj.{suffix}"), joined))
            layout = Arrangement(depthwise=suffix == "weight")
            found[f"{own}.taps.{suffix}"] = Source(self.spellings(f"{stem}.conv.{suffix}"), arrangement=layout)
            found[f"{own}.o.{suffix}"] = Source(self.spellings(f"{stem}.out_proj.{suffix}"))
        return found

    def exact(self, templates: Iterable[str]) -> set[str]:
        return {
            name
            for template in templates
            for index in self.indices(template)
            for name in self.spellings(at(template, index))
        }

    def arrangement(self, stored: str, index: int) -> Arrangement:
        runs = 1
        if stored in self.family.by_head:
            mixer = self.spec.layers[index].mixer
            assert isinstance(mixer, Attention)
            runs = mixer.num_kv_heads
        return Arrangement(transposed=stored in self.family.transposed, runs=runs)

    def indices(self, template: str) -> range:
        return range(len(self.spec.layers) if "{i}" in template else 1)

    def spellings(self, name: str) -> tuple[str, ...]:
        """The name as this checkpoint has it, then as older ones do."""
        exact = name if self.has_base else name.removeprefix(self.family.base)
        olds = [exact.removesuffix(new) + old for new, old in self.family.renamed if exact.endswith(new)]
        return (exact, *olds)


def at(template: str, index: int) -> str:
    return template.replace("{i}", str(index))
