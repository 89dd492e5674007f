"""Losses of a pair that need nothing but its own two scores: pure functions of tensors.

    chosen, rejected   (P,) scores, nats: log-ratios policy minus reference, summed over a completion; changed by
                       loss.f_divergence, loss.length_normalize, loss.ld_alpha or loss.reference_free where set
    delta              chosen - rejected
    beta               strength of the pull towards the reference, > 0, dimensionless
    loss               (P,) nats, with gradient; nothing is reduced: the caller divides by the pairs of the global batch

Legend: P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.objective.divergences import steady_exp


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO; with label_smoothing (eps, the probability that a label is flipped, in [0, 0.5)) conservative DPO (cDPO).

    loss = -(1 - eps) logsigmoid(beta delta) - eps logsigmoid(-beta delta)

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; eps: Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3
    """
    margins = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def robust(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """An unbiased estimate of the DPO loss of clean labels, from labels of which a share eps is flipped.

    loss = (-(1 - eps) logsigmoid(beta delta) + eps logsigmoid(-beta delta)) / (1 - 2 eps)

    Source:
        Chowdhury et al. 2024, arXiv:2403.00409
    """
    margins = beta * (chosen - rejected)
    clean, flipped = (1 - label_smoothing) * logsigmoid(margins), label_smoothing * logsigmoid(-margins)
    return (flipped - clean) / (1 - 2 * label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SLiC's hinge on the DPO margin; with reference_free it is SLiC's own. A pair is done once delta is 1 / beta.

    loss = max(0, 1 - beta delta)

    Source:
        Zhao et al. 2023, arXiv:2305.10425; with a reference: Liu et al. 2023 (RSO), arXiv:2309.06657
    """
    return torch.relu(1 - beta * (chosen - rejected))


def ipo_sum(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO as its paper has it, log-ratios summed: the gap is pulled to 1 / (2 beta) nats. beta is the paper's tau.

    loss = (delta - 1 / (2 beta))^2

    Source:
        Azar et al. 2023, arXiv:2310.12036, Eq. 17
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def ipo(chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float) -> Tensor:
    """IPO per token: the target is in nats a token. Another objective than `ipo_sum` at the same beta.

    loss = (c / len_c - r / len_r - 1 / (2 beta))^2

    Source:
        Azar et al. 2023, arXiv:2310.12036, Eq. 17; averaging is not in the paper: TRL asked its authors
    """
    return ipo_sum(chosen / chosen_lengths, rejected / rejected_lengths, beta)


def sigmoid_norm(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """DPO on log-ratios per token, against a preference for length; beta around 5 is usual. eps as in `sigmoid`.

    loss = -(1 - eps) logsigmoid(beta d) - eps logsigmoid(-beta d),  d = c / len_c - r / len_r

    Source:
        Lambert et al. 2024 (Tulu 3), arXiv:2411.15124
    """
    return sigmoid(chosen / chosen_lengths, rejected / rejected_lengths, beta, label_smoothing)


def exo_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs: the reverse KL between the policy's preference q and the smoothed label; eps > 0, 1e-3 is usual.

    loss = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps),  q = sigmoid(beta delta)

    Source:
        Ji et al. 2024, arXiv:2402.00856, Eq. 16
    """
    margins = beta * (chosen - rejected)
    of_chosen = margins.sigmoid() * (logsigmoid(margins) - math.log1p(-label_smoothing))
    return of_chosen + (-margins).sigmoid() * (logsigmoid(-margins) - math.log(label_smoothing))


def nca_pair(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """NCA for pairs: noise contrastive alignment of absolute rewards, which keeps the chosen likelihood from falling.

    loss = -logsigmoid(beta c) - 1/2 logsigmoid(-beta c) - 1/2 logsigmoid(-beta r)

    Source:
        Chen et al. 2024, arXiv:2402.05369
    """
    c, r = beta * chosen, beta * rejected
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


def bco_pair(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """BCO for pairs: a binary classifier of chosen and rejected by their rewards; no running shift, as in TRL 1.16.

    loss = -logsigmoid(beta c) - logsigmoid(-beta r)

    Source:
        Jung et al. 2024, arXiv:2404.04656
    """
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SPPO with hard labels (the chosen one always wins): log-ratios pulled to 1 / (2 beta) and -1 / (2 beta) nats.

    loss = (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2

    Source:
        Wu et al. 2024, arXiv:2405.00675, Eq. 4.7
    """
    target = 1 / (2 * beta)
    return (chosen - target) ** 2 + (rejected + target) ** 2


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-zero: raise the chosen, lower the rejected; where chosen answers are better than the policy's own.

    loss = 1 - sigmoid(beta c) + sigmoid(beta r)

    Source:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7
    """
    return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-down: lower both, the rejected more; where the policy's own answers are better than the chosen ones.

    loss = sigmoid(beta c) + 1 - sigmoid(beta delta)

    Source:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8
    """
    return (beta * chosen).sigmoid() + 1 - (beta * (chosen - rejected)).sigmoid()


def discopop(chosen: Tensor, rejected: Tensor, beta: float, tau: float = 0.05) -> Tensor:
    """DiscoPOP, a discovered blend of logistic and exponential loss; tau is loss.discopop_tau.

    loss = -(1 - m) logsigmoid(beta delta) + m exp(-beta delta),  m = sigmoid(beta delta / tau)

    Source:
        Lu et al. 2024, arXiv:2406.08414, Eq. 5
    """
    margins = beta * (chosen - rejected)
    blend = (margins / tau).sigmoid()
    return -(1 - blend) * logsigmoid(margins) + blend * steady_exp(-margins)


def dpop(chosen: Tensor, rejected: Tensor, beta: float, penalty: float = 50.0) -> Tensor:
    """DPO-Positive (Smaug): DPO that pays for a chosen completion below the reference; lambda is loss.dpop_lambda.

    loss = -logsigmoid(beta (delta - lambda max(0, -c)))

    Source:
        Pal et al. 2024, arXiv:2402.13228
    """
    return -logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


def odpo(
    chosen: Tensor, rejected: Tensor, margins: Tensor, beta: float, alpha: float = 1.0, scale: str = "log"
) -> Tensor:
    """DPO with an offset (ODPO): better by more must be further apart. m is the margin that the data gives the pair,
    alpha is loss.odpo_alpha, f is the logarithm or, with loss.odpo_scale identity, m itself.

    loss = -logsigmoid(beta delta - alpha f(m))

    Source:
        Amini et al. 2024, arXiv:2402.10571
    """
    offsets = alpha * (margins.log() if scale == "log" else margins)
    return -logsigmoid(beta * (chosen - rejected) - offsets)


def sampo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SamPO: DPO on as many tokens of the longer completion as the shorter one has, drawn anew at every step.

    loss = -logsigmoid(beta delta),  c and r summed over min(len_c, len_r) tokens each

    The draw depends on (train.seed, step, pair) alone (`tokens.sampled`); a validation pair keeps its tokens. Log-probs
    and rewards are reported of the drawn tokens.

    Source:
        Lu et al. 2024, arXiv:2406.10957
    """
    return sigmoid(chosen, rejected, beta)


def tdpo(
    chosen: Tensor, rejected: Tensor, chosen_kls: Tensor, rejected_kls: Tensor, beta: float, alpha: float = 0.5
) -> Tensor:
    """TDPO2: token-level DPO, which also bounds how far every next-token distribution moves.

    loss = -logsigmoid(beta (delta - alpha (KL_r - stopgrad(KL_c))))

    KL is summed over the positions of a completion, KL(reference || policy) over the vocabulary; alpha is
    loss.tdpo_alpha. Rewards are those of DPO; the authors' code adds the KL to them.

    Args:
        chosen_kls, rejected_kls: (P,) sequential KLs, nats, with gradient.

    Source:
        Zeng et al. 2024, arXiv:2404.11999
    """
    return -logsigmoid(beta * (chosen - rejected - alpha * (rejected_kls - chosen_kls.detach())))
