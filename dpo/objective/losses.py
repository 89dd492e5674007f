"""Log-probs -> loss per pair: pure functions of tensors.

Symbols: log-ratios are policy minus reference, summed over a completion, in nats; delta = chosen_logratios -
rejected_logratios. Rewards are beta * log-ratio. Nothing is reduced: the caller sums and divides by the pairs of the
global batch. Legend: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.types import LossOutput, PairLogps

Loss = Callable[[PairLogps, PairLogps], LossOutput]


def _logratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    if policy.chosen.shape != reference.chosen.shape:
        raise ValueError(f"policy has {len(policy.chosen)} pairs, reference {len(reference.chosen)}")
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected  # (P,), (P,)


def _output(losses: Tensor, chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> LossOutput:
    return LossOutput(losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach())


def sigmoid_loss(
    policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0
) -> LossOutput:
    """DPO, with conservative label smoothing.

    losses = -(1 - label_smoothing) * logsigmoid(beta * delta) - label_smoothing * logsigmoid(-beta * delta)

    Args:
        policy: Summed completion log-probs of the policy, nats, fp32. Fields (P,).
        reference: The same under the frozen reference; no gradient. Fields (P,).
        beta: KL strength, > 0, dimensionless; 0.1-0.5 in the paper.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).
    Returns:
        Per-pair losses (P,) and detached rewards (P,).
    Raises:
        ValueError: If the two differ in P.
    Source:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences", Eq. 3.
    """
    chosen_logratios, rejected_logratios = _logratios(policy, reference)
    delta = chosen_logratios - rejected_logratios
    losses = -logsigmoid(beta * delta) * (1 - label_smoothing) - logsigmoid(-beta * delta) * label_smoothing
    return _output(losses, chosen_logratios, rejected_logratios, beta)


def hinge_loss(policy: PairLogps, reference: PairLogps, beta: float) -> LossOutput:
    """SLiC's hinge on the DPO margin: losses = relu(1 - beta * delta).

    Args, Returns, Raises: as `sigmoid_loss`; beta is the reciprocal of the margin.
    Source:
        Zhao et al. 2023, arXiv:2305.10425; with a reference: Liu et al. 2023 (RSO), arXiv:2309.06657.
    """
    chosen_logratios, rejected_logratios = _logratios(policy, reference)
    losses = torch.relu(1 - beta * (chosen_logratios - rejected_logratios))
    return _output(losses, chosen_logratios, rejected_logratios, beta)


def ipo_loss(policy: PairLogps, reference: PairLogps, beta: float) -> LossOutput:
    """IPO with log-ratios averaged over tokens: losses = (c/len_c - r/len_r - 1 / (2 beta))^2.

    Args, Returns, Raises: as `sigmoid_loss`; beta is the paper's tau. Rewards stay those of summed log-ratios.
    Source:
        Azar et al. 2023, arXiv:2310.12036, Eq. 17; averaging is not in the paper, TRL took it up after asking its
        authors.
    """
    chosen_logratios, rejected_logratios = _logratios(policy, reference)
    delta = chosen_logratios / policy.chosen_lengths - rejected_logratios / policy.rejected_lengths
    return _output((delta - 1 / (2 * beta)) ** 2, chosen_logratios, rejected_logratios, beta)


def ipo_sum_loss(policy: PairLogps, reference: PairLogps, beta: float) -> LossOutput:
    """IPO as the DPO authors' code has it, log-ratios summed: losses = (delta - 1 / (2 beta))^2.

    Args, Returns, Raises: as `sigmoid_loss`; beta is the paper's tau. Not the same objective as `ipo_loss` at the
    same beta.
    Source:
        Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    chosen_logratios, rejected_logratios = _logratios(policy, reference)
    delta = chosen_logratios - rejected_logratios
    return _output((delta - 1 / (2 * beta)) ** 2, chosen_logratios, rejected_logratios, beta)


def make_loss(name: str, beta: float, label_smoothing: float = 0.0) -> Loss:
    """The objective of a run as one function of policy and reference log-probs.

    Args:
        name: sigmoid, hinge, ipo or ipo_sum.
        beta, label_smoothing: See `sigmoid_loss`.
    Returns:
        loss(policy, reference) -> LossOutput.
    Raises:
        KeyError: If there is no loss of that name.
    """
    losses: dict[str, Loss] = {
        "sigmoid": lambda policy, reference: sigmoid_loss(policy, reference, beta, label_smoothing),
        "hinge": lambda policy, reference: hinge_loss(policy, reference, beta),
        "ipo": lambda policy, reference: ipo_loss(policy, reference, beta),
        "ipo_sum": lambda policy, reference: ipo_sum_loss(policy, reference, beta),
    }
    return losses[name]


def start_loss(name: str, beta: float) -> float:
    """The loss of any pair while policy and reference are equal: what an honest start shows.

    Args:
        name, beta: As in `make_loss`; label smoothing does not move it.
    Returns:
        ln 2 for sigmoid, 1 for hinge, 1 / (4 beta^2) for both IPOs.
    """
    equal = PairLogps(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1))
    return float(make_loss(name, beta)(equal, equal).losses)
