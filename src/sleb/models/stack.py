"""The block stack of a causal LM: the only place that knows how transformers models are built.

A decoder is three parts: what comes before the blocks (embedding, positions, masks), a list of
blocks that each map a hidden state to a hidden state of the same shape, and what comes after
(final norm, head). The stack lets a caller run the three apart, with the model's own code for
each, so that no architecture needs a class of its own:

    hidden, calls = stack.enter(ids)              # [B, T, D], what each block would be given
    hidden = stack.run(i, hidden, calls)          # block i alone
    logits = stack.exit(hidden)                   # [B, T, V]

``bypassed`` makes blocks pass their input through. The list itself is never shortened while a
model is measured: masks are chosen by position in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sleb.calibration.images import Images, with_images
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import Plan
from sleb.core.units import ATTENTION, block_of, canonical, parse_unit, part_of
from sleb.models.heads import plain_head
from sleb.models.offload import Reader, fetch, offloading
from sleb.models.parts import Nothing, Part, find_parts

PROBE_TOKENS = 8


class _Entered(Exception):
    """Ends a forward pass once every block's call is recorded; never leaves this module."""


class Call(NamedTuple):
    """What the model hands a block besides the hidden state, and what it adds to the stream behind
    that block: features of images [B, T, D], in some models."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})
    added: Tensor | None = None


def decoder_config(config: Any) -> Any:
    """The part of a config that describes the text decoder (for a plain LM: all of it)."""
    return config.get_text_config(decoder=True)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks, found by structure.

    Raises:
        UnsupportedModel: an encoder-decoder, or there is not exactly one outermost ``ModuleList``
            as long as the config's number of hidden layers.
    """
    config: Any = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; sleb cuts decoder-only models")
    text = decoder_config(config)
    n = getattr(text, "num_hidden_layers", None)
    if not isinstance(n, int):
        raise UnsupportedModel(f"{name}: the config has no `num_hidden_layers`")
    root, prefix = _decoder(model)
    # a list without weights is no stack (granite_swa keeps one rotary embedding per base)
    lists = [
        (p, m)
        for p, m in root.named_modules()
        if isinstance(m, nn.ModuleList) and next(m.parameters(), None) is not None
    ]
    paths = [p for p, _ in lists]
    found = [
        (prefix + p, m)
        for p, m in lists
        if len(m) == n and not any(p.startswith(other + ".") for other in paths)
    ]
    if len(found) != 1:
        where = ", ".join(p for p, _ in found) or "none"
        raise UnsupportedModel(
            f"{name}: expected one list of {n} blocks (num_hidden_layers), found {where}"
        )
    return found[0]


def _decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """The text decoder and its path prefix; the model itself where transformers names none, or
    one without blocks (modernbert-decoder: its output head)."""
    get: Callable[[], nn.Module] | None = getattr(model, "get_decoder", None)
    decoder = get() if get is not None else None
    path = next((p for p, module in model.named_modules() if module is decoder), "")
    root = model.get_submodule(path)
    if not path or not any(isinstance(module, nn.ModuleList) for module in root.modules()):
        return model, ""
    return root, path + "."


class BlockStack:
    """Blocks of ``model`` with everything needed to run, skip and describe them.

    Raises:
        UnsupportedModel: see :func:`find_blocks`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.path, self.blocks = find_blocks(model)
        self._width: dict[int, int | None] | None = None
        self._parts: dict[int, dict[str, Part]] = {}
        self._head: tuple[nn.Linear | None] | None = None
        self.reader = Reader()
        self.images: Images | None = None  # what windows with images are given by
        # that blocks run one by one are the model's own forward pass: of texts, of images
        self.checked: set[bool] = set()

    def __len__(self) -> int:
        return len(self.blocks)

    # -- running the three parts -------------------------------------------------------------

    @torch.inference_mode()
    def enter(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Everything before the first block. ids [B, T] -> hidden [B, T, D] and, per block, the
        further arguments (masks, positions) that the model would hand it for this batch. Of windows
        with images there is one at a time.

        Raises:
            InputError: T is more than the model reads.
        """
        if self.max_length is not None and ids.shape[1] > self.max_length:
            raise InputError(
                f"windows of {ids.shape[1]} tokens are longer than the {self.max_length} that "
                f"{self.name} reads: use --length {self.max_length}"
            )
        *_, last = self.used
        calls = [Call() for _ in self.blocks]
        entry: list[Tensor] = []
        run: list[int] = []
        seen = with_images(ids)

        def recorder(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = _split(args, kwargs)
                calls[i] = Call(args, kwargs)
                if not entry:
                    entry.append(hidden)
                elif seen and hidden.any():
                    calls[run[-1]] = calls[run[-1]]._replace(added=hidden)
                if i == last:
                    raise _Entered
                run.append(i)
                # after nothing, what the next block gets is what is added in between
                return self._wrap(i, torch.zeros_like(hidden) if seen else hidden)

            return forward

        with self._shadowed({self.blocks[i]: recorder(i) for i in self.used}):
            with contextlib.suppress(_Entered):
                self.model(**self.inputs(ids), use_cache=False)
        return entry[0], calls

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Windows [B, T] as arguments of the model, with the images of a window that has some."""
        given = {"input_ids": ids} if self.images is None else self.images.inputs(ids)
        to, dtype = self.input_device, self.dtype
        return {k: v.to(to, dtype if v.is_floating_point() else None) for k, v in given.items()}

    @torch.inference_mode()
    def run(self, i: int, hidden: Tensor, call: Call) -> Tensor:
        """Block ``i`` alone, and what the model adds behind it. hidden [B, T, D] -> [B, T, D];
        ``call`` comes from :meth:`enter`. A block that text does not run through gives back what it
        is given."""
        if i not in self.used:
            return hidden
        out = self.blocks[i](hidden, *call.args, **call.kwargs)
        return self.skip(out if isinstance(out, Tensor) else out[0], call)

    def skip(self, hidden: Tensor, call: Call) -> Tensor:
        """What comes behind a block that passes on ``hidden`` [B, T, D]."""
        return hidden if call.added is None else hidden + call.added.to(hidden.device)

    @torch.inference_mode()
    def exit(self, hidden: Tensor) -> Tensor:
        """Everything after the last block. hidden [B, T, D] -> logits [B, T, V].

        Final norm and head work on each position by itself, so any slice of positions may be
        given; the token ids that go in at the front are placeholders.
        """
        first, *others = self.used
        shadows = {self.blocks[i]: self._passing(i) for i in others}
        shadows[self.blocks[first]] = lambda *args, **kwargs: self._wrap(first, hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.input_device)
        with self._shadowed(shadows):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @torch.inference_mode()
    def before_head(self, hidden: Tensor) -> Tensor:
        """What the output head is given behind the last block. hidden [B, T, D] -> [B, T, D]; see
        :attr:`plain_head`."""
        head, given = self.plain_head, []
        assert head is not None

        def forward(x: Tensor) -> Tensor:
            given.append(x)
            raise _Entered

        with self._shadowed({head: forward}), contextlib.suppress(_Entered):
            self.exit(hidden)
        return given[0]

    @property
    def plain_head(self) -> nn.Linear | None:
        """See :func:`sleb.models.heads.plain_head`. No block is run, which may be on disk."""
        if self._head is None:
            hidden, _ = self.enter(torch.zeros((1, 2), dtype=torch.long))
            self._head = (plain_head(self.model, lambda: self.exit(hidden)),)
        return self._head[0]

    @contextlib.contextmanager
    def holding(self, i: int, then: int | None = None) -> Iterator[None]:
        """Keep block ``i`` in place for several :meth:`run` of it. This matters to a model that
        accelerate offloads: its hooks would fetch the weights anew for every call. Meanwhile block
        ``then`` is fetched, to be held next. To hold a block that is held already is nothing."""
        hooks = offloading(self.blocks[i])
        if not hooks:
            yield
            return
        weights = self.reader.take(i, hooks)
        if then is not None and (ahead := offloading(self.blocks[then])):
            self.reader.start(then, ahead)
        try:
            for module, hook in hooks:
                fetch(module, hook, weights.pop(0))
            yield
        finally:
            for module, hook in hooks:
                hook.offload = True
                hook.post_forward(module, None)

    @contextlib.contextmanager
    def bypassed(self, units: Collection[int]) -> Iterator[None]:
        """Blocks pass their input through, and parts of blocks add nothing to it; afterwards the
        model is as it was, bit for bit.

        Raises:
            InputError: a block does not exist.
            UnsupportedModel: see :meth:`parts`.
        """
        if bad := sorted(u for u in units if not 0 <= block_of(u) < len(self)):
            raise InputError(f"blocks {bad} do not exist: {self.name} has 0..{len(self) - 1}")
        gone = canonical(units)
        shadows = {self.blocks[u]: self._passing(u) for u in gone if not part_of(u)}
        for unit in gone:
            if kind := part_of(unit):
                block, part = block_of(unit), self.parts(block_of(unit))[kind]
                module = self.blocks[block].get_submodule(part.name)
                shadows[module] = self._adding_nothing(block, kind)
        with self._shadowed(shadows):
            yield

    @torch.inference_mode()
    def parts(self, i: int) -> dict[str, Part]:
        """The attention and the MLP of block ``i``, by these names.

        Raises:
            UnsupportedModel: it is not made of these two, or not so that one can be left out.
        """
        if i not in self._parts:
            length = min(PROBE_TOKENS, self.max_length or PROBE_TOKENS)
            rows = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
            hidden, calls = self.enter(torch.arange(1, length + 1)[None] % rows)
            with self.holding(i):
                hidden = hidden.to(self.device(i))
                self._parts[i] = find_parts(
                    f"{self.name}: block {i}",
                    self.blocks[i],
                    lambda: self.run(i, hidden, calls[i]),
                )
        return self._parts[i]

    def remove_parts(self, units: Collection[int]) -> None:
        """Take parts of blocks out for good, and their weights with them.

        Raises:
            UnsupportedModel: see :meth:`parts`.
        """
        found = [(self.blocks[block_of(u)], self.parts(block_of(u))[part_of(u)]) for u in units]
        for block, part in found:
            block.set_submodule(part.name, Nothing(part))

    # -- facts -------------------------------------------------------------------------------

    @property
    def used(self) -> Collection[int]:
        """The blocks that text runs through, in order: all but those that look at images alone."""
        return self._widths().keys()

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @property
    def input_device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def max_length(self) -> int | None:
        """Longest text that the model reads, in tokens; None where there is no limit."""
        return getattr(decoder_config(self.model.config), "max_position_embeddings", None)

    def device(self, i: int) -> torch.device:
        """Where block ``i`` computes, and with it what enters and leaves it."""
        for module in self.blocks[i].modules():
            hook = getattr(module, "_hf_hook", None)
            for each in getattr(hook, "hooks", (hook,)):
                if (where := getattr(each, "execution_device", None)) is not None:
                    return torch.device(where)
        return next((p.device for p in self.blocks[i].parameters()), self.input_device)

    @property
    def streamed(self) -> bool:
        """Whether blocks are fetched when they run, rather than being in the device's memory."""
        return any(p.device.type == "meta" for p in self.blocks.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' floating-point parameters."""
        for parameter in self.blocks.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.get_default_dtype()

    # -- shadowing ---------------------------------------------------------------------------

    def _passing(self, i: int) -> Callable[..., Any]:
        sets_positions = i in self.giving_positions

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _, rest = _split(args, kwargs)
            if sets_positions:
                self._refuse_cached(i, hidden, rest)
            return self._wrap(i, hidden)

        return forward

    def _adding_nothing(self, i: int, kind: str) -> Callable[..., Any]:
        part = self.parts(i)[kind]
        sets_positions = kind == ATTENTION and i in self.giving_positions

        def forward(*args: Any, **kwargs: Any) -> Any:
            if sets_positions:
                self._refuse_cached(i, *_split(args, kwargs)[::2])
            return part.nothing(*args, **kwargs)

        return forward

    @property
    def giving_positions(self) -> set[int]:
        """The blocks from whose keys and values transformers takes positions and masks of a cached
        step: the first, and the first of each attention type. Empty ones would be silently wrong.
        """
        return giving_positions(self.model.config)

    def _refuse_cached(self, i: int, hidden: Tensor, rest: dict[str, Any]) -> None:
        if _longest(rest.get("past_key_values")) > hidden.shape[1]:
            raise InputError(
                f"block {i} is bypassed, and generating with a cache needs it: pass "
                "use_cache=False, or write the checkpoint with sleb apply"
            )

    def _wrap(self, i: int, hidden: Tensor) -> Any:
        """``hidden`` in the shape that block ``i`` returns: a tensor, or a tuple led by one."""
        width = self._widths().get(i)
        return hidden if width is None else (hidden,) + (None,) * (width - 1)

    def _widths(self) -> dict[int, int | None]:
        """By block the length of the tuple it returns, None for a bare tensor; from one dry run.

        Raises:
            UnsupportedModel: a block needs more from the block before it than the hidden state, or
                blocks are not run one after the other.
        """
        if self._width is None:
            found: dict[int, int | None] = {}
            extras: dict[int, Any] = {}  # outputs by id; kept alive, so that no id is used twice
            handed: list[tuple[int, int | str]] = []  # block and argument
            order: list[int] = []

            def hook(i: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
                handed.extend((i, name) for name, value in given if id(value) in extras)
                order.append(i)
                found[i] = None if isinstance(output, Tensor) else len(output)
                rest = () if isinstance(output, Tensor) else output[1:]
                extras.update({id(x): x for x in rest if x is not None})

            handles = [
                block.register_forward_hook(
                    lambda _, args, kwargs, output, i=i: hook(i, args, kwargs, output),
                    with_kwargs=True,
                )
                for i, block in enumerate(self.blocks)
            ]
            try:
                own = self._dry_run()
            finally:
                for handle in handles:
                    handle.remove()
            text = decoder_config(self.model.config)
            of_images = set(getattr(text, "cross_attention_layers", None) or ())
            if order != sorted(found) or not {*range(len(self))} <= found.keys() | of_images:
                raise UnsupportedModel(
                    f"{self.name}: a forward pass runs {len(order)} blocks, and not each of its "
                    f"{len(self)} once"
                )
            if handed:
                self._refuse_exchange(handed, own)
            self._width = found
        return self._width

    @torch.inference_mode()
    def _dry_run(self) -> Tensor:
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.input_device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _refuse_exchange(self, handed: list[tuple[int, int | str]], own: Tensor) -> None:
        """Some blocks are handed further outputs of the one before: refuse, if these matter."""

        def drop(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            names = {name for block, name in handed if block == i}
            kept = tuple(None if k in names else value for k, value in enumerate(args))
            return kept, {k: None if k in names else value for k, value in kwargs.items()}

        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: drop(i, args, kwargs), with_kwargs=True
            )
            for i, block in enumerate(self.blocks)
        ]
        try:
            same = torch.equal(self._dry_run(), own)
        except Exception:  # of any type: the block's code does not expect None
            same = False
        finally:
            for handle in handles:
                handle.remove()
        if not same:
            raise UnsupportedModel(
                f"{self.name}: block {handed[0][0]} takes more from the block before it than the "
                "hidden state, so no block can be removed exactly"
            )

    @contextlib.contextmanager
    def _shadowed(self, forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
        """See :func:`shadowed`."""
        if forwards:
            self._widths()
        with shadowed(forwards):
            yield


@contextlib.contextmanager
def shadowed(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Put functions in the modules' instance slot ``forward``, and put back what was there
    (accelerate keeps its device hooks in that very slot)."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, old in before.items():
            if old is None:
                vars(module).pop("forward", None)
            else:
                module.forward = old


def giving_positions(config: Any) -> set[int]:
    """See :attr:`BlockStack.giving_positions`."""
    kinds = getattr(decoder_config(config), "layer_types", None) or ["all"]
    return {0, *map(kinds.index, kinds)}


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, Any]:
    """A block call's hidden state, and the arguments that remain."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


def _longest(cache: Any) -> int:
    """Tokens in the fullest layer of a key-value cache; 0 without one."""
    layers = getattr(cache, "layers", None) or ()
    lengths = [x.get_seq_length() for x in layers if hasattr(x, "get_seq_length")]
    return max((int(length) for length in lengths), default=0)


@contextlib.contextmanager
def bypassed(model: Any, blocks: Collection[int | str] | Plan) -> Iterator[None]:
    """Make ``blocks``, or those of a plan, of a transformers causal LM (or of a
    :class:`sleb.LoadedModel`) pass their input through; of ``"12.attention"`` or ``"12.mlp"`` only
    that part adds nothing to it. On exit the model is restored bit for bit, also after an
    exception.

    Raises:
        InputError: a block does not exist; or, while generating with a cache, one that transformers
            takes positions from is bypassed (the first, and the first of each attention type).
        UnsupportedModel: no single block list can be found, or no such part.
    """
    stack = BlockStack(getattr(model, "model", model) if not hasattr(model, "config") else model)
    units = blocks.removed if isinstance(blocks, Plan) else map(parse_unit, blocks)
    with stack.bypassed([*units]):
        yield
