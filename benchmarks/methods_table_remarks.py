"""What is said of single rows of the methods table: why a method does worse than no teacher, by measurement."""

from __future__ import annotations

from collections.abc import Mapping

_SHORT = "only {steps} of its 600 steps see labels. The student alone, trained for {other} steps, reaches {alone} %."
_LONG = "With three times the steps of both it is {gain} points from no teacher."
_WARM = "the temperature. With T = 1 in place of {T} it is {gain} points from no teacher. See `kd`."

AT_CHANCE = ("lrc_bert",)
"""Methods whose student need not beat chance; their remark says why."""

REMARKS: Mapping[str, str] = {
    "alp_kd": _WARM.format(T=20, gain="+0.39"),
    "annealing_kd": _SHORT.format(steps=180, other=180, alone=77.74) + " " + _LONG.format(gain="+0.27"),
    "continuation_kd": "level with no teacher, within the spread over the seeds.",
    "dgkd": _WARM.format(T=4, gain="-0.21") + " Its assistants learn from the same sentences.",
    "diito": _SHORT.format(steps=300, other=300, alone=79.63),
    "distilbert": _SHORT.format(steps=300, other=300, alone=79.63),
    "glmd": "its last 300 steps see soft labels, and none the labels. Alone, in 300 steps, it reaches 79.63 %.",
    "kd": "the temperature, and few steps. The teacher is right on 98.87 % of the sentences that it teaches, which it "
    "was trained on, with a doubt of 0.010: at T = 1 its soft labels are the labels, and the student is +0.05 points "
    "from no teacher. At T = 4 the doubt is 0.21, and the student is to meet the teacher's logits, not its choice, "
    "which takes longer. " + _LONG.format(gain="+0.79") + " The runs are in `methods_variants.md`.",
    "lrc_bert": "the perturbation. Every token's embedding, of length 9 in this encoder, is pushed by a vector of "
    "length 1 (`radius`) against the objective, labels included, and no step sees a clean text. Seed 2, same steps, by "
    "`radius`: 0 gives 80.1 %, 0.1 gives 80.2, 0.3 gives 76.1, 1 (the default, the reading of the paper) 49.2: "
    "chance. On this encoder set `radius = 0.1`.",
    "mobilebert": _SHORT.format(steps=180, other=180, alone=77.74),
    "mt_bert": "mostly the hidden states, which are of the size of the encoder's and not normalised: with "
    "`hidden_weight = 0` it is -0.52 points from no teacher. What is left is of the size of `kd` with T = 1 and nine "
    "tenths of soft labels (-0.30): each of the two teachers weighs about as much as the labels.",
    "pd": _SHORT.format(steps=200, other=180, alone=77.74) + " As many train it as a language model from a new head.",
    "pkd": _WARM.format(T=5, gain="+0.39"),
    "rail_kd": "few steps. Neither T = 1 in place of 10 (-1.06) nor no layers (`layer_weight = 0`: -0.66) mends it. "
    + _LONG.format(gain="0.00"),
    "rl_kd": "few steps, in two stages that each warm up and decay. T = 1 in place of 10 does not mend it (-1.07). "
    + _LONG.format(gain="+1.04"),
    "sid": "only 150 of its 600 steps see soft labels, and none the labels. The student alone, trained for 150 steps, "
    "reaches 77.05 %. " + _LONG.format(gain="+1.59"),
    "takd": _WARM.format(T=4, gain="-0.13") + " Its assistant learns from the same sentences.",
    "theseus": "every part of the student is trained, not its blocks alone as in the file: its pooler and head are new "
    "here, where the paper's are the teacher's.",
    "tmkd": _SHORT.format(steps=300, other=300, alone=79.63),
    "universal_kd": _SHORT.format(steps=300, other=300, alone=79.63)
    + " The 300 before them train the pseudo-classifiers too.",
}
