"""Which type every matrix gets, and which of its weights are kept: one base type for all, or the best for a number of
bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..calibration.calibrate import EMBEDDING_OUTPUT, Calibration
from ..calibration.predict_loss import BITS, Losses, embedding_loss, options_for
from ..calibration.score_weights import score_tensor, score_weights
from ..config import DEFAULT_EMBEDDING_TYPE, ExportConfig, parse_size
from ..errors import TacqError
from ..format.gguf_file import numpy_shape, padded, type_bytes
from ..format.inspect_gguf import is_linear
from ..format.sparse_section import MOST_COLUMNS, capacity
from ..format.tensor_types import TYPES_BY_NAME, TensorType
from ..inputs.held_types import why_stock
from ..inputs.link_tensors import Linked, LinkedTensor
from ..inputs.load_model import LoadedModel
from ..reporting import Reporter
from .allocate_bits import Option, allocate, least_bytes
from .select_weights import TensorSelection, global_top, keep_for_target, select_weights

ReferenceError = Callable[[LinkedTensor, int], torch.Tensor]
# Our keys and the table of tensors grow the header of the float file by less than this.
_HEADER_GROWTH = 2048


def fixed_types(loaded: LoadedModel, config: ExportConfig) -> dict[str, str]:
    """{GGUF name: type in lower case} of what the user decided: --tensor-type, and the types of embedding and head.

    Raises TacqError for a pattern that no matrix matches, or a mixed type for the embedding or the head.
    """
    tensors: list[Linked] = [*loaded.linear, loaded.embedding, *([loaded.head] if loaded.head else [])]
    fixed: dict[str, str] = {}
    for pattern, asked_type in config.fixed_types():
        matches = [t for t in tensors if pattern.search(t.name)]
        if not matches:
            raise TacqError(
                f"--tensor-type: '{pattern.pattern}' matches no matrix of {loaded.name}; names are like "
                f"{loaded.linear[0].name}."
            )
        for tensor in matches:
            fixed.setdefault(tensor.name, asked_type)
    for tensor in tensors:
        kind = ours(fixed.get(tensor.name))
        if kind and tensor.stock:
            raise TacqError(
                f"--tensor-type: '{tensor.name}' cannot be {kind.name}, as it {why_stock(tensor)}; give it one of: "
                f"{', '.join(tensor.stock)}."
            )
        if (
            kind
            and kind.p
            and (capacity(tensor.shape[0], tensor.n_weights, kind.p) < 1 or tensor.shape[1] > MOST_COLUMNS)
        ):
            raise TacqError(
                f"--tensor-type: '{tensor.name}' ({tensor.shape[0]} x {tensor.shape[1]}) has no room for kept weights "
                f"in {kind.name}; give it a base type or a larger S."
            )
    for end, asked in [(loaded.embedding, config.token_embedding_type), (loaded.head, config.output_tensor_type)]:
        if end is None:
            continue
        if end.stock and asked is not None and ours(asked):
            raise TacqError(
                f"'{end.name}' cannot be {asked.upper()}, as it {why_stock(end)}; give it one of: "
                f"{', '.join(end.stock)}."
            )
        if asked is not None or config.target_size is None:
            fixed.setdefault(end.name, asked or (end.stock[-1] if end.stock else DEFAULT_EMBEDDING_TYPE))
        if "_s" in fixed.get(end.name, ""):
            raise TacqError(
                f"--tensor-type: '{end.name}' cannot be {fixed[end.name]}; embedding and head keep no weights, "
                "give it a base type."
            )
    if not config.allocates or (config.target_bpw is None and config.target_size is None):
        for tensor in loaded.linear:
            if tensor.stock:  # the widest: nothing was asked that it has to fit into
                fixed.setdefault(tensor.name, tensor.stock[-1])
    return fixed


def ours(kind: str | None) -> TensorType | None:
    """Our type of that name; None for a stock type or none."""
    return TYPES_BY_NAME.get((kind or "").upper())


def plan_types(
    loaded: LoadedModel,
    calibration: Calibration,
    texts: list[list[int]],
    head: LinkedTensor,
    fixed: dict[str, str],
    config: ExportConfig,
    reference_error: ReferenceError,
    reporter: Reporter,
) -> dict[str, TensorSelection]:
    """{GGUF name: type and kept weights} of every tensor that becomes one of ours, embedding and head among them.

    reference_error(tensor, bits) gives W - Q(W). `fixed` gets the stock types that the allocation has chosen for what
    ours cannot hold. Raises TacqError for a target that cannot be met.
    """
    linear = [t for t in loaded.linear if t.name not in fixed]
    given = {name: kind for name, asked in fixed.items() if (kind := ours(asked))}
    selection: dict[str, TensorSelection] = {}

    if config.allocates:
        for name, chosen in allocate_types(loaded, calibration, texts, head, linear, fixed, config, reporter).items():
            if isinstance(chosen, str):
                fixed[name] = chosen
            else:
                given[name] = chosen
    elif linear:
        scores = score_weights(
            config.score,
            linear,
            calibration.statistic(config.score),
            lambda t: reference_error(t, config.base.bits),
            config.seed,
            reporter,
        )
        selection = select_weights(
            scores, config.base, _n_to_keep(scores, loaded, fixed, config) if not config.no_kept else 0
        )
        del scores
    mixed = [t for t in loaded.linear if t.name in given and given[t.name].p]
    # The types are decided, so each has its own top; one saliency is in memory at a time.
    for tensor in reporter.track(mixed, "scoring"):
        kind = given[tensor.name]
        room = max(capacity(tensor.shape[0], tensor.n_weights, kind.p), 0)
        score = score_tensor(
            config.score,
            tensor,
            calibration.statistic(config.score),
            partial(_error_at, reference_error, kind.bits),
            config.seed,
        )
        kept = global_top({tensor.name: score}, min(room, tensor.n_weights))[tensor.name]
        selection[tensor.name] = TensorSelection(kind, kept, len(kept))
    nothing = torch.empty(0, dtype=torch.int64)
    return selection | {
        name: TensorSelection(kind, nothing, 0) for name, kind in given.items() if name not in selection
    }


def _error_at(reference_error: ReferenceError, bits: int, tensor: LinkedTensor) -> torch.Tensor:
    return reference_error(tensor, bits)


def _n_to_keep(
    scores: dict[str, torch.Tensor], loaded: LoadedModel, fixed: dict[str, str], config: ExportConfig
) -> int:
    """Size of the global top: a share of the weights, or as many as the limit's bits hold beside the matrices of fixed
    types."""
    limit = config.bpw_limit
    if limit is None:
        assert config.ratio is not None
        return round(config.ratio * sum(s.numel() for s in scores.values()))
    shapes = {name: (s.shape[0], s.shape[1]) for name, s in scores.items()}
    n_free = sum(s.numel() for s in scores.values())
    counted = [t for t in loaded.linear if config.target_bpw is not None or not t.stock]
    n_counted = sum(t.n_weights for t in counted)
    spent = sum(type_bytes(t.shape, fixed[t.name]) for t in counted if t.name in fixed)
    if n_free < n_counted:
        least = 8 * (spent + config.base.nbytes(n_free)) / n_counted
        if least > limit:
            raise TacqError(
                f"--target-bpw {limit:g} cannot be met: with the types of --tensor-type and {config.base.name} it is "
                f"{least:.3f} bits per weight; raise it."
            )
    return keep_for_target(scores, shapes, config.base, (limit * n_counted - 8 * spent) / n_free)


def allocate_types(
    loaded: LoadedModel,
    calibration: Calibration,
    texts: list[list[int]],
    head: LinkedTensor,
    linear: list[Linked],
    fixed: dict[str, str],
    config: ExportConfig,
    reporter: Reporter,
) -> dict[str, TensorType | str]:
    """{GGUF name: our type, or a stock one where ours cannot hold it} of every tensor that is not fixed, of least
    predicted loss within the target. Raises TacqError if the smallest types exceed it."""
    losses = calibration.losses()
    shares: dict[str, dict[int, list[float]]] = {}
    wanted = {t.name for t in linear}
    groups = [k for k, group in enumerate(calibration.all_groups) if any(t.name in wanted for t in group)]
    for k in [] if config.no_kept else reporter.track(groups, "measuring what kept weights save"):
        shares |= calibration.kept_shares(k, config.score, config.seed)
    options: dict[str, list[Option]] = {t.name: options_for(t, losses[t.name], shares.get(t.name, {})) for t in linear}
    if config.target_size is None:
        assert config.bpw_limit is not None
        # The default is one for our types: what they cannot hold comes on top of it.
        counted = [t for t in loaded.linear if config.target_bpw is not None or not t.stock]
        spent = sum(type_bytes(t.shape, fixed[t.name]) for t in counted if t.name in fixed)
        budget = int(config.bpw_limit * sum(t.n_weights for t in counted) / 8)
        flag = f"--target-bpw {config.bpw_limit:g}"

        def unit(n: int) -> str:
            return f"{8 * n / loaded.n_linear:.3f} bits per weight"

    else:
        if head.name not in fixed:
            options[head.name] = options_for(head, losses[head.name], {})
        if loaded.embedding.name not in fixed:
            energy = calibration.row_energy(EMBEDDING_OUTPUT)
            loss: Losses = {
                kind: embedding_loss(calibration.trial, loaded.embedding, energy, texts, kind)
                for kind in loaded.embedding.stock or BITS
            }
            if loaded.head is None:  # the same matrix makes the logits
                loss = {kind: of_kind + losses[head.name][kind] for kind, of_kind in loss.items()}
            options[loaded.embedding.name] = options_for(loaded.embedding, loss, {})
        budget = parse_size(str(config.target_size))
        spent = _bytes_of_the_rest(loaded, options, fixed)
        align = int(loaded.reference.alignment)
        options = {
            name: [Option(o.type, padded(o.n_bytes, align), o.loss) for o in choice] for name, choice in options.items()
        }
        flag = f"--target-size {config.target_size}"

        def unit(n: int) -> str:
            return f"{n} bytes"

    if not options:
        return {}
    least = least_bytes(options) + spent
    if least > budget:
        raise TacqError(f"{flag} cannot be met: with the smallest types it is {unit(least)}; raise it.")
    chosen = allocate(options, budget - spent)
    total = sum(o.loss for o in chosen.values())
    reporter.say(f"Allocation: predicted loss {total:.4g} nats a token; {_counts(chosen)}.")
    return {name: o.type for name, o in chosen.items()}


def predicted_loss(
    calibration: Calibration, selection: dict[str, TensorSelection], score: str, seed: int
) -> float | None:
    """Nats a token that the types of the blocks' matrices are predicted to cost (predict_loss.py); None where weights
    are kept by a score whose worth no allocation has measured."""
    losses, total = calibration.losses(), 0.0
    for k, group in enumerate(calibration.all_groups):
        chosen = [t for t in group if t.name in selection and is_linear(t.name, t.shape)]
        mixed = any(selection[t.name].type.p for t in chosen)
        if mixed and not calibration.has_kept_shares(k, score, seed):
            return None
        shares = calibration.kept_shares(k, score, seed) if mixed else {}
        for tensor in chosen:
            kind = selection[tensor.name].type
            total += next(
                o.loss for o in options_for(tensor, losses[tensor.name], shares.get(tensor.name, {})) if o.type == kind
            )
    return total


def _bytes_of_the_rest(loaded: LoadedModel, options: dict[str, list[Option]], fixed: dict[str, str]) -> int:
    """Bytes of the file that the allocation does not decide: header, norms, tensors of fixed types."""
    spent = int(loaded.reference.data_offset) + _HEADER_GROWTH
    for tensor in loaded.reference.tensors:
        if tensor.name not in options:
            size = type_bytes(numpy_shape(tensor), fixed[tensor.name]) if tensor.name in fixed else int(tensor.n_bytes)
            spent += padded(size, int(loaded.reference.alignment))
    return spent


def _counts(chosen: dict[str, Option]) -> str:
    """'120 TACQ2_S1, 90 TACQ2', most frequent first."""
    names = [o.type.upper() if isinstance(o.type, str) else o.type.name for o in chosen.values()]
    counts = sorted(((names.count(name), name) for name in set(names)), key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{count} {name}" for count, name in counts)
