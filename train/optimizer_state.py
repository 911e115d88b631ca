"""What an optimizer keeps from one run to the next: its states under their parameters' names, wherever they rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shared.errors import UserError
from train.buckets import BLOCK_NUMEL, Bucket
from train.offload import States
from train.optimizer_options import OptimizerOptions


@dataclass(frozen=True)
class OptimizerState:
    """Where an optimizer's states are; what goes into a checkpoint and comes out of it is described there."""

    options: OptimizerOptions
    parameters: Mapping[str, torch.nn.Parameter]
    buckets: list[Bucket]
    states: States
    codes: Mapping[str, torch.Tensor]
    """What the bytes of 8-bit states stand for, by name; empty where there are none."""

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors, copies on the CPU, and what describes them."""
        parts: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in self.parameters}
        described: dict[str, Any] = {
            name: {"shape": list(parameter.shape), "tensors": [], "numbers": {}}
            for name, parameter in self.parameters.items()
        }
        for bucket in self.buckets:
            if not any(piece.num_steps for piece in bucket.pieces):
                continue
            buffer = self.states.at_rest(bucket.index).to("cpu")
            for piece in bucket.pieces:
                if not piece.num_steps:  # none yet: the parameter had no gradient so far
                    continue
                for key, of in piece.fields.items():
                    parts[piece.name].setdefault(key, []).append(of.of(buffer))
                if bucket.eight_bit:
                    parts[piece.name] |= {key: [code.cpu()] for key, code in self.codes.items()}
                    described[piece.name]["numbers"] = {"step": piece.num_steps}
                else:
                    parts[piece.name]["step"] = [torch.tensor([float(piece.num_steps)])]
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            described[name]["tensors"] = list(parts[name])
            for key in list(parts[name]):
                whole = torch.cat(parts[name].pop(key))  # copies, also where there is one piece
                tensors[f"{name}.{key}"] = whole.view(_shape(key, parameter, whole.numel()))
        return tensors, {"kind": self.options.kind, "master": self.options.master, "parameters": described}

    def restore(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `collect` gave. Raises `UserError`, before anything is changed, where it is of another kind,
        other parameters, or incomplete."""
        in_8_bits = frozenset(piece.name for bucket in self.buckets if bucket.eight_bit for piece in bucket.pieces)
        tensors, meta = held_as_here(tensors, meta, in_8_bits, self.codes)
        self._refuse_other(tensors, meta)
        described = meta["parameters"]
        for bucket in self.buckets:
            had_steps = any(piece.num_steps for piece in bucket.pieces)
            if not had_steps and not any(described[piece.name]["tensors"] for piece in bucket.pieces):
                continue
            buffer = self.states.at_rest(bucket.index).zero_()
            for piece in bucket.pieces:
                piece.num_steps = 0
                if not described[piece.name]["tensors"]:  # none yet: the parameter had no gradient so far
                    continue
                for key, of in piece.fields.items():
                    saved = tensors[f"{piece.name}.{key}"].reshape(-1)
                    start = piece.start // BLOCK_NUMEL if key.startswith("absmax") else piece.start
                    of.of(buffer).copy_(saved[start : start + of.shape[0]])
                numbers = described[piece.name]["numbers"]
                piece.num_steps = int(numbers["step"] if numbers else tensors[f"{piece.name}.step"].item())

    def _refuse_other(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        mend = "resume with the options of the saved run, or start without its optimizer state"
        if meta["kind"] != self.options.kind:
            raise UserError(
                f"the saved optimizer state is of kind '{meta['kind']}', "
                f"but optimizer.kind is '{self.options.kind}': {mend}"
            )
        if meta.get("master", False) != self.options.master:
            raise UserError(
                f"the saved optimizer state is {'with' if meta.get('master', False) else 'without'} float32 master "
                f"weights, but optimizer.master is {str(self.options.master).lower()}: {mend}"
            )
        described = meta["parameters"]
        wrong = [
            ("of parameters that are not trained here", [name for name in described if name not in self.parameters]),
            ("missing for parameters", [name for name in self.parameters if name not in described]),
            (
                "of another shape for",
                [
                    f"{name} {tuple(described[name]['shape'])}, here {tuple(parameter.shape)}"
                    for name, parameter in self.parameters.items()
                    if name in described and tuple(described[name]["shape"]) != tuple(parameter.shape)
                ],
            ),
        ]
        for what, names in wrong:
            if names:
                raise UserError(f"the saved optimizer state is {what}: {_some(names)}: {mend}")
        expected = {f"{name}.{key}" for name, of in described.items() for key in of["tensors"]}
        if expected != set(tensors):
            raise UserError(
                f"the saved optimizer state is damaged, these tensors are missing or unexpected: "
                f"{_some(sorted(expected ^ set(tensors)))}: resume from another checkpoint, or start without it"
            )
        misshapen = [key for key, tensor in tensors.items() if not self._fits(key, tensor)]
        if misshapen:
            raise UserError(
                f"the saved optimizer state is not as torch or bitsandbytes keep it here: {_some(sorted(misshapen))}: "
                "resume with the version that the run was saved with, or start without its optimizer state"
            )

    def _fits(self, key: str, tensor: torch.Tensor) -> bool:
        """Whether a saved tensor is of the dtype and size that it has here; codes of 8-bit numbers, of the values."""
        name, _, state = key.rpartition(".")
        if state == "step":
            return tensor.numel() == 1
        if state in self.codes:
            return torch.equal(self.codes[state].cpu(), tensor.cpu())
        fields = [piece.fields.get(state) for bucket in self.buckets for piece in bucket.pieces if piece.name == name]
        return tensor.numel() == sum(of.shape[0] for of in fields if of is not None) and all(
            of is not None and of.dtype == tensor.dtype for of in fields
        )


def held_as_here(
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    in_8_bits: frozenset[str],
    codes: Mapping[str, torch.Tensor],
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]:
    """What `collect` gave, with moments in 8 bits of the weights in `in_8_bits` and in float32 of others: cards that
    could not cut a weight between two blocks have kept float32 of it, and other cards can, or the other way round.
    `codes`: as in `OptimizerState`. What is as it should be comes back as it is."""
    if not codes:
        return tensors, meta
    held, described = dict(tensors), dict(meta["parameters"])
    for name, of in described.items():
        was_8_bits = "state1" in of["tensors"]
        if not of["tensors"] or was_8_bits == (name in in_8_bits):
            continue
        saved = {key: held.pop(f"{name}.{key}") for key in of["tensors"] if f"{name}.{key}" in held}
        found = {key: tensor for key, tensor in saved.items() if key == "master"}
        for number, moment in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            code = codes[f"qmap{number}"].cpu()
            if was_8_bits:
                found[moment] = _from_8_bits(saved[f"state{number}"], saved[f"absmax{number}"], code)
            else:
                found[f"state{number}"], found[f"absmax{number}"] = _to_8_bits(saved[moment], code)
                found[f"qmap{number}"] = code
        numbers = {}
        if was_8_bits:
            found["step"] = torch.tensor(float(of["numbers"]["step"]))
        else:
            numbers = {"step": int(saved["step"].item())}
        described[name] = {**of, "tensors": list(found), "numbers": numbers}
        held |= {f"{name}.{key}": tensor for key, tensor in found.items()}
    return held, {**meta, "parameters": described}


def _from_8_bits(state: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    values = code[state.reshape(-1).long()]
    return (values * absmax.repeat_interleave(BLOCK_NUMEL)[: values.numel()]).view(state.shape)


def _to_8_bits(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each value's nearest in `code`, as a share of the largest of its block; and those."""
    flat = values.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)
    absmax = blocks.abs().amax(dim=1)
    shares = (blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).reshape(-1)[: flat.numel()]
    state = torch.bucketize(shares, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return state.view(values.shape), absmax


def _shape(key: str, parameter: torch.Tensor, numel: int) -> tuple[int, ...]:
    """The shape of a state in a checkpoint: one value for each weight, or for each block, or one number."""
    if key == "step":
        return ()
    per_weight = not key.startswith(("absmax", "qmap"))
    return tuple(parameter.shape) if per_weight else (numel,)


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
