"""Which torch matrix each matrix of the float GGUF is: proven number by number, so no architecture needs code here.

What is no multiplication, and what cannot be proven to be one, is copied into the output as the float GGUF has it:
tensors of one dimension or of F32, convolutions, the parameters of state-space layers, positions, routers; numbers that
torch does not have; and matrices that the model, run on a few tokens, does not multiply one input with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import gguf
import torch
from transformers import PreTrainedModel

from ..errors import TacqError
from ..format.gguf_file import field_value, numpy_shape, tensor_values
from ..reporting import Reporter
from .held_types import stock_types
from .linked import Linked, LinkedExperts, LinkedTensor, dense, matrices_of, of_experts
from .match_rows import Match, TorchMatrices, as_stored, match_experts, match_matrix
from .probe_matrices import not_multiplied

__all__ = ["Linked", "LinkedExperts", "LinkedTensor", "dense", "link_tensors", "matrices_of", "of_experts"]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Matrices of the GGUF that are no multiplication of a token's state, or whose few weights decide too much: routers,
# positions, embeddings of layers and of token types, convolutions. llama-quantize leaves them alone as well.
_COPIED = re.compile(
    r"_norm|ffn_gate_inp|ffn_gate_tid2eid|altup|laurel|per_layer_|position_embd|token_types|conv1d|shortconv\.conv|attn_rel_b|"
    r"time_mix_(first|w0|w1|w2|v0|v1|v2|a0|a1|a2|g1|g2|decay)|indexer"
)


def tensor_names(reference: gguf.GGUFReader) -> gguf.TensorNameMap:
    """gguf-py's names of torch modules in GGUF, for the file's architecture. Raises TacqError for one that it does not
    know."""
    architecture = field_value(reference, "general.architecture")
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise TacqError(f"gguf-py does not know the architecture '{architecture}'; update gguf, or use another model.")
    return gguf.get_tensor_name_map(
        known[architecture], int(field_value(reference, f"{architecture}.block_count") or 0)
    )


def link_tensors(
    model: PreTrainedModel, reference: gguf.GGUFReader, reporter: Reporter | None = None
) -> tuple[list[Linked], LinkedTensor, LinkedTensor | None]:
    """(matrices of the blocks, embedding, head or None if tied) of a model and its float GGUF.

    Modules are looked for under the names of gguf-py's TensorNameMap first, then among all of the block; every value is
    compared: the GGUF must hold the torch weight rounded to F16, in some order of its rows. A line says what is copied
    and why. Raises TacqError for an embedding or a head that torch does not have, a value that is not finite, or where
    no matrix is left.
    """
    architecture, name_map = field_value(reference, "general.architecture"), tensor_names(reference)
    modules: dict[str, str] = {}
    for module_name, module in model.named_modules():
        gguf_name = name_map.get_name(module_name)
        if gguf_name is not None and isinstance(getattr(module, "weight", None), torch.Tensor):
            modules[gguf_name + ".weight"] = module_name
    candidates, torch_matrices = _candidates(reference), TorchMatrices(model)
    linked: list[Linked] = []
    special: dict[str, LinkedTensor] = {}
    copied: dict[str, list[gguf.gguf_reader.ReaderTensor]] = {}
    for tensor in candidates:
        shape = numpy_shape(tensor)
        what = f"tensor '{tensor.name}' ({' x '.join(map(str, shape))}) of architecture '{architecture}'"
        if tensor.name in (EMBEDDING, HEAD):
            special[tensor.name] = _link_end(model, tensor, modules.get(tensor.name), what)
        elif (found := _link(tensor, modules.get(tensor.name), torch_matrices, what)) is not None:
            linked.append(found)
        else:
            copied.setdefault("torch has no matrix of these numbers", []).append(tensor)
    reasons = not_multiplied(model, linked)
    # What looks like a matrix for each expert may be one matrix for all heads (MLA's values).
    again = [
        one
        for t in candidates
        if t.name in reasons and len(t.shape) == 3
        for one in [_link_flat(t, modules.get(t.name), torch_matrices, t.name)]
        if one is not None
    ]
    of_flat = not_multiplied(model, again)
    flat = {t.name: t for t in again if t.name not in of_flat}
    linked = [flat.get(t.name, t) for t in linked]
    reasons = {name: why for name, why in reasons.items() if name not in flat}
    for tensor in candidates:
        if tensor.name in reasons:
            copied.setdefault(reasons[tensor.name], []).append(tensor)
    linked = [t for t in linked if t.name not in reasons]
    for why, tensors in copied.items():
        size = sum(int(t.n_bytes) for t in tensors) / 1e6
        (reporter or Reporter()).say(
            f"{len(tensors)} {'matrix is' if len(tensors) == 1 else 'matrices are'} copied as the float file has "
            f"{'it' if len(tensors) == 1 else 'them'} ({size:.1f} MB): {why}; {', '.join(t.name for t in tensors[:3])}"
            f"{', ...' if len(tensors) > 3 else ''}."
        )
    if EMBEDDING not in special or not linked:
        raise TacqError(
            f"The GGUF of architecture '{architecture}' has no "
            + (
                f"{EMBEDDING}; it is no language model."
                if linked
                else "weight matrices that tacq-export can quantize; there is nothing to export."
            )
        )
    return linked, special[EMBEDDING], special.get(HEAD)


def _candidates(reference: gguf.GGUFReader) -> list[gguf.gguf_reader.ReaderTensor]:
    """The tensors that may be matrices of ours. Of a file that has matrices of 16 bits, those of F32 are none: the
    converter has left at F32 what is not to be quantized."""
    f32 = gguf.GGMLQuantizationType.F32
    several = [t for t in reference.tensors if len(t.shape) in (2, 3) and t.tensor_type.name[0] != "I"]
    short = any(t.tensor_type != f32 for t in several if t.name not in (EMBEDDING, HEAD))
    return [
        t
        for t in several
        if t.name in (EMBEDDING, HEAD)
        or (t.name.endswith(".weight") and not _COPIED.search(t.name) and not (short and t.tensor_type == f32))
    ]


def _link_end(
    model: PreTrainedModel, tensor: gguf.gguf_reader.ReaderTensor, module_name: str | None, what: str
) -> LinkedTensor:
    """The embedding, or a head of its own."""
    is_head = tensor.name == HEAD
    module = model.get_output_embeddings() if is_head else model.get_input_embeddings()
    if module_name is not None:
        module = model.get_submodule(module_name)
    expected = torch.nn.Linear if is_head else torch.nn.Embedding
    if not isinstance(module, expected) or len(tensor.shape) != 2:
        raise TacqError(
            f"{what} is {'nothing' if module is None else 'a ' + type(module).__name__} in torch, expected a "
            f"{expected.__name__}; this architecture is not supported yet."
        )
    name = module_name or next(name for name, m in model.named_modules() if m is module)
    end = TorchMatrices(torch.nn.ModuleDict({"only": module}))
    match = match_matrix(as_stored(tensor_values(tensor), what), end.sources(tensor.name, None))
    if match is None or match.source.transposed or match.own is not None:
        raise TacqError(
            f"{what} does not hold the numbers of its torch weight, in any order of its rows; this architecture is not "
            "supported yet."
        )
    return LinkedTensor(tensor.name, name, module, match.order, stock=stock_types(match.source.matrix))


def _link(
    tensor: gguf.gguf_reader.ReaderTensor, module_name: str | None, torch_matrices: TorchMatrices, what: str
) -> Linked | None:
    """One matrix, rows of one, or a matrix for each expert; None if torch does not have these numbers."""
    shape = numpy_shape(tensor)
    if len(shape) == 3:
        stored = as_stored(tensor_values(tensor), what)
        sources = list(torch_matrices.sources(tensor.name, module_name, shape[0]))
        if (matches := match_experts(list(stored), sources)) is not None and _are_apart(matches):
            return LinkedExperts(
                tensor.name, tuple(_linked(f"{tensor.name}[{e}]", m, True) for e, m in enumerate(matches))
            )
    return _link_flat(tensor, module_name, torch_matrices, what)


def _link_flat(
    tensor: gguf.gguf_reader.ReaderTensor, module_name: str | None, torch_matrices: TorchMatrices, what: str
) -> LinkedTensor | None:
    """One matrix, be it of three dimensions in the GGUF."""
    stored = as_stored(tensor_values(tensor), what)
    match = match_matrix(stored.reshape(-1, stored.shape[-1]), torch_matrices.sources(tensor.name, module_name))
    return None if match is None else _linked(tensor.name, match)


def _are_apart(matches: Sequence[Match]) -> bool:
    """Whether each expert has a matrix of its own, which heads of one projection have not."""
    return len({(m.source.module_name, m.source.parameter_name, m.source.expert) for m in matches}) == len(matches)


def _linked(name: str, match: Match, is_expert: bool = False) -> LinkedTensor:
    source = match.source
    matrix = source.matrix if match.own is None else source.matrix[match.own]
    return LinkedTensor(
        name,
        source.module_name,
        source.module,
        match.order,
        match.own,
        source.parameter_name,
        source.expert,
        source.n_experts,
        source.transposed,
        is_expert,
        stock_types(matrix),
    )
