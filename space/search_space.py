"""SearchSpace: a factorized hierarchical space of networks, described by data.

A network is a sequence of blocks; each block has its own sub-space (operation, kernel size,
squeeze-and-excitation, skip, width, depth) and all layers of a block are identical (MnasNet paper,
section 4.1). The space is an ordered list of Decisions; *tokens* hold one choice index for each.

A space's file (configs/space/) gives the skeleton and the choices:

    name: mnasnet
    stem: 32                             # output channels; its stride is 2 or stem_stride
    head: 1280
    resolution: 224
    classes: 1000
    choices:                       # of every block; a block's own `choices` replace single entries
      op: [conv, dconv, mbconv3, mbconv6]
      kernel_size: [3, 5]
      se_ratio: [0, 0.25]
      skip: [pool, identity, none]
      filters_scale: [0.75, 1.0, 1.25]   # times the block's `filters`, rounded to a multiple of 8
      layers_offset: [-1, 0, 1]          # plus the block's `layers`, never below 1
    blocks:
      - {filters: 16, layers: 1, stride: 1}
      - {filters: [24, 32], layers: [1, 2, 3], stride: 2}    # lists are choices by themselves

A choice list with one entry makes no Decision. Tokens -> Architecture is many-to-one: widths round
to the same number, depth clamps at 1, a skip that no layer can carry is none. `encode` returns the
lowest token vector of a network, and `decode(encode(a)) == a` for every member.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from space.architecture import Architecture, BlockSpec, Op, Skip
from space.errors import ConfigError
from space.mnasnet import round_filters
from space.records import build, find_config, load_yaml, record
from space.tokens import Tokens, mutated, neighbours_of, uniform_tokens

#: A mutation that must give another network is drawn again at most so often; in the shipped
#: spaces at most 7 % of the draws give the same one.
MAX_DRAWS = 1000


def _parse_op(text: str) -> tuple[Op, int]:
    """`mbconv6` -> (mbconv, 6); `conv`, `dconv` -> (text, 1)."""
    if text == "conv":
        return "conv", 1
    if text == "dconv":
        return "dconv", 1
    match = re.fullmatch(r"mbconv([1-9]\d?)", text, re.ASCII)
    if match is None:
        raise ValueError(f"op must hold conv, dconv or mbconv<expansion>, but got {text!r}")
    return "mbconv", int(match.group(1))


def _check_list(name: str, values: Sequence[object] | None) -> None:
    if values is not None and not values:
        raise ValueError(f"{name} must hold at least one choice, but got an empty list")
    if values is not None and len(set(values)) != len(values):
        raise ValueError(f"{name} must hold different choices, but got {list(values)}")


@record
class ChoicesConfig:
    """Choice lists; None leaves an entry to the space's own `choices`."""

    op: tuple[str, ...] | None = None
    kernel_size: tuple[int, ...] | None = None
    se_ratio: tuple[float, ...] | None = None
    skip: tuple[Skip, ...] | None = None
    filters_scale: tuple[float, ...] | None = None
    layers_offset: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_list(field.name, getattr(self, field.name))
        for text in self.op or ():
            _parse_op(text)
        if self.filters_scale and min(self.filters_scale) <= 0:
            raise ValueError(f"filters_scale must be > 0, but got {list(self.filters_scale)}")

    def over(self, base: ChoicesConfig) -> ChoicesConfig:
        """Return these choices with `base`'s in place of None."""
        values = {
            f.name: getattr(base, f.name)
            if getattr(self, f.name) is None
            else getattr(self, f.name)
            for f in dataclasses.fields(self)
        }
        return ChoicesConfig(**values)


_FIXED = ChoicesConfig(("mbconv6",), (3,), (0.0,), ("identity",), (1.0,), (0,))


@record
class BlockConfig:
    """One block of the skeleton: a single number is scaled or offset, a list is the choices."""

    filters: int | tuple[int, ...]
    layers: int | tuple[int, ...]
    stride: int
    choices: ChoicesConfig = ChoicesConfig()

    def __post_init__(self) -> None:
        for name in ("filters", "layers"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            _check_list(name, numbers)
            if min(numbers) < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")


@record
class SpaceConfig:
    """A space's file; see the module's docstring."""

    name: str
    stem: int
    head: int
    resolution: int
    classes: int
    blocks: tuple[BlockConfig, ...]
    choices: ChoicesConfig = ChoicesConfig()
    stem_stride: int = 2
    input_channels: int = 3

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks must hold at least one block, but got none")


@record
class Decision:
    """One categorical choice.

    Attributes:
        name: `block3.kernel_size`; blocks count from 0.
        block_index: The block that it belongs to.
        choices: What each index stands for, as text.
    """

    name: str
    block_index: int
    choices: tuple[str, ...]


_FIELDS = ("op", "kernel_size", "se_ratio", "skip", "filters", "layers")


class SearchSpace:
    """The set of networks that a SpaceConfig describes.

    Args:
        config: The skeleton and the choices.

    Raises:
        ConfigError: Some choice makes an impossible network.
    """

    def __init__(self, config: SpaceConfig) -> None:
        self.config = config
        self._options = [self._block_options(block) for block in config.blocks]
        self.decisions: tuple[Decision, ...] = tuple(
            Decision(f"block{index}.{field}", index, tuple(str(value) for value in values))
            for index, options in enumerate(self._options)
            for field, values in zip(_FIELDS, options, strict=True)
            if len(values) > 1
        )
        self.num_choices: tuple[int, ...] = tuple(len(d.choices) for d in self.decisions)
        self._tables: dict[tuple[int, int], dict[BlockSpec, Tokens]] = {}
        try:
            #: Each block's tokens -> what stands there, and where its tokens are.
            self._blocks = [dict(self._block_specs(i)) for i in range(len(self._options))]
            widths = [len(next(iter(specs))) for specs in self._blocks]
            ends = list(itertools.accumulate(widths))
            self._places = [slice(end - n, end) for end, n in zip(ends, widths, strict=True)]
            if self.decisions:
                self.decode((0,) * len(self.decisions))
        except ValueError as error:
            raise ConfigError(f"space {config.name}: {error}.") from None
        if not self.decisions:
            raise ConfigError(f"space {config.name}: must leave something to decide.")

    def _block_options(self, block: BlockConfig) -> tuple[Sequence[Any], ...]:
        choices = block.choices.over(self.config.choices).over(_FIXED)
        assert choices.filters_scale is not None  # `over(_FIXED)` filled them in
        assert choices.layers_offset is not None
        filters = (
            block.filters
            if isinstance(block.filters, tuple)
            else [round_filters(block.filters, scale) for scale in choices.filters_scale]
        )
        layers = (
            block.layers
            if isinstance(block.layers, tuple)
            else [max(1, block.layers + offset) for offset in choices.layers_offset]
        )
        options = (choices.op, choices.kernel_size, choices.se_ratio, choices.skip)
        return (*(option or () for option in options), filters, layers)

    @property
    def name(self) -> str:
        """The space's name."""
        return self.config.name

    @property
    def size(self) -> int:
        """Number of token vectors, exactly."""
        return math.prod(self.num_choices)

    @functools.cached_property
    def distinct_size(self) -> int:
        """Number of different networks, exactly.

        Blocks interact only through the channels handed on, so a sum over these suffices.
        """
        ways = {self.config.stem: 1}
        for index in range(len(self._options)):
            following: dict[int, int] = {}
            for filters, count in ways.items():
                for block in self._table(index, filters):
                    following[block.filters] = following.get(block.filters, 0) + count
            ways = following
        return sum(ways.values())

    def check(self, tokens: Sequence[int]) -> Tokens:
        """Return the tokens as a tuple of int.

        Raises:
            ValueError: Wrong number of tokens or a token out of range.
        """
        if len(tokens) != len(self.decisions):
            raise ValueError(
                f"tokens must have {len(self.decisions)} entries, but got {len(tokens)}"
            )
        for token, number, decision in zip(tokens, self.num_choices, self.decisions, strict=True):
            if not 0 <= token < number:
                raise ValueError(f"{decision.name} must be in [0, {number - 1}], but got {token}")
        return tuple(int(token) for token in tokens)

    def decode(self, tokens: Sequence[int]) -> Architecture:
        """Return the network that the tokens stand for.

        Raises:
            ValueError: See `check`.
        """
        checked = self.check(tokens)
        blocks = zip(self._blocks, self._places, strict=True)
        return Architecture(
            stem_filters=self.config.stem,
            blocks=tuple(specs[checked[place]] for specs, place in blocks),
            head_filters=self.config.head,
            resolution=self.config.resolution,
            classes=self.config.classes,
            stem_stride=self.config.stem_stride,
            input_channels=self.config.input_channels,
        )

    def encode(self, architecture: Architecture) -> Tokens:
        """Return the lowest token vector that stands for the network.

        Raises:
            ValueError: The network is not a member; says what differs first.
        """
        config = self.config
        for name, ours in (
            ("stem_filters", config.stem),
            ("head_filters", config.head),
            ("resolution", config.resolution),
            ("classes", config.classes),
            ("stem_stride", config.stem_stride),
            ("input_channels", config.input_channels),
        ):
            if getattr(architecture, name) != ours:
                raise ValueError(
                    f"{name} must be {ours} in space {self.name},"
                    f" but got {getattr(architecture, name)}"
                )
        if len(architecture.blocks) != len(self._options):
            raise ValueError(
                f"blocks must be {len(self._options)} in space {self.name},"
                f" but got {len(architecture.blocks)}"
            )
        tokens: list[int] = []
        filters = config.stem
        for index, block in enumerate(architecture.blocks):
            found = self._table(index, filters).get(block)
            if found is None:
                raise ValueError(f"block {index} is not in space {self.name}: got {block}")
            tokens.extend(found)
            filters = block.filters
        return tuple(tokens)

    def __contains__(self, architecture: Architecture) -> bool:
        try:
            self.encode(architecture)
        except ValueError:
            return False
        return True

    def sample(self, rng: np.random.Generator) -> Tokens:
        """Return tokens drawn uniformly: uniform over token vectors, not over networks."""
        return uniform_tokens(self.num_choices, rng)

    def neighbours(self, tokens: Sequence[int]) -> Iterator[Tokens]:
        """Yield every token vector that differs in exactly one decision, in order."""
        return neighbours_of(self.check(tokens), self.num_choices)

    def mutate(
        self,
        tokens: Sequence[int],
        rng: np.random.Generator,
        *,
        changes: int = 1,
        different_network: bool = False,
    ) -> Tokens:
        """Return tokens that differ from the given ones in exactly `changes` decisions.

        Decisions and their new choices are drawn as `space.tokens.mutated` says.

        Args:
            tokens: The ones to start from; left as they are.
            rng: Drawn from.
            changes: Number of decisions, at least 1.
            different_network: Draw again while the result stands for the same network, so that
                it is uniform over the mutations that change the network.

        Raises:
            ValueError: `changes` is more than there are decisions, the tokens do not fit (see
                `check`), or no mutation that changes the network was found.
        """
        base = self.check(tokens)
        network = self.decode(base) if different_network else None
        for _ in range(MAX_DRAWS):
            made = mutated(base, self.num_choices, rng, changes=changes)
            if network is None or self.decode(made) != network:
                return made
        raise ValueError(
            f"tokens {base} must have mutations that stand for another network, but {MAX_DRAWS}"
            f" of {changes} decisions all stood for the same one; change more decisions"
        )

    def crossover(self, a: Sequence[int], b: Sequence[int], rng: np.random.Generator) -> Tokens:
        """Return a child that takes each block whole from `a` or from `b`, equally likely.

        Blocks and not single decisions are exchanged, because a block's decisions were good (or
        bad) together, and because blocks are what the space is factorized into (MnasNet paper,
        section 4.1): the child's blocks are its parents', tried already.

        Raises:
            ValueError: The tokens of a parent do not fit; see `check`.
        """
        from_a = rng.random(len(self.config.blocks)) < 0.5
        pairs = zip(self.decisions, self.check(a), self.check(b), strict=True)
        return tuple(x if from_a[decision.block_index] else y for decision, x, y in pairs)

    def edit_distance(self, a: Architecture, b: Architecture) -> int:
        """Return the number of decisions in which the networks' encodings differ.

        Encodings are canonical (`encode`), so this is a metric on networks: 0 for equal ones
        only. One changed decision moves at most three positions of an encoding: its own and,
        where a width or a depth decides who can carry an identity, the skip of its block and of
        the next. The least distance over all token vectors would count that as one, but is no
        metric: it breaks the triangle inequality.

        Raises:
            ValueError: One of them is not a member; see `encode`.
        """
        return sum(x != y for x, y in zip(self.encode(a), self.encode(b), strict=True))

    def all_tokens(self) -> Iterator[Tokens]:
        """Yield every token vector in order; only sensible for small spaces."""
        return itertools.product(*(range(n) for n in self.num_choices))

    def block_choices(self, block_index: int, input_filters: int) -> tuple[BlockSpec, ...]:
        """Return the different blocks that may stand at a place after so many channels."""
        return tuple(self._table(block_index, input_filters))

    def _block_specs(self, index: int) -> Iterator[tuple[Tokens, BlockSpec]]:
        options = self._options[index]
        stride = self.config.blocks[index].stride
        for picked in itertools.product(*(range(len(v)) for v in options)):
            values = tuple(v[i] for v, i in zip(options, picked, strict=True))
            tokens = tuple(i for v, i in zip(options, picked, strict=True) if len(v) > 1)
            yield tokens, _block_spec(values, stride)

    def _table(self, index: int, input_filters: int) -> dict[BlockSpec, Tokens]:
        key = (index, input_filters)
        if key not in self._tables:
            table: dict[BlockSpec, Tokens] = {}
            for tokens, block in self._blocks[index].items():
                # The first tokens in order are the lowest.
                table.setdefault(block.canonical(input_filters), tokens)
            self._tables[key] = table
        return self._tables[key]


def _block_spec(values: tuple[Any, ...], stride: int) -> BlockSpec:
    op_text, kernel_size, se_ratio, skip, filters, layers = values
    op, expand_ratio = _parse_op(op_text)
    return BlockSpec(op, kernel_size, expand_ratio, se_ratio, skip, filters, layers, stride)


def load_space(
    name_or_path: str,
    *,
    resolution: int | None = None,
    classes: int | None = None,
    input_channels: int | None = None,
) -> SearchSpace:
    """Return a space by shipped name or path, set to another kind of image where asked.

    Raises:
        ConfigError: See `find_config` and `build`.
    """
    path = find_config(name_or_path, "space")
    config = build(SpaceConfig, load_yaml(path), where=str(path))
    return adapted_space(
        config, resolution=resolution, classes=classes, input_channels=input_channels
    )


def adapted_space(
    config: SpaceConfig,
    *,
    resolution: int | None = None,
    classes: int | None = None,
    input_channels: int | None = None,
) -> SearchSpace:
    """Return the space that a file's content describes, set to another kind of image where asked.

    Raises:
        ConfigError: It describes none, or does not take what is changed.
    """
    changes = {
        name: value
        for name, value in (
            ("resolution", resolution),
            ("classes", classes),
            ("input_channels", input_channels),
        )
        if value is not None
    }
    return SearchSpace(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
