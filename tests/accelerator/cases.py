"""What is run on the pretended accelerator and on the host, to be compared."""

from typing import Any

SOURCES = {
    "mixtral": "a Mixtral of two layers and eight experts, in bfloat16",
    "qwen": "a Qwen3 of two layers and eight experts, in bfloat16",
    "deepseek-fp8": "DeepSeek-V3 in FP8",
    "gpt-oss-mxfp4": "gpt-oss in MXFP4",
}

# Name, source, and options; those of the method are words, as the command line takes them.
_HC, _REFIT, _REAP = {"preset": "hc-smoe"}, {"preset": "hc-refit", "refit_passes": 1}, {"preset": "reap"}
CONVERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "hc-refit": ("mixtral", _REFIT),
    "hc-smoe": ("mixtral", _HC),
    "m-smoe": ("mixtral", {"preset": "m-smoe"}),
    "reap": ("mixtral", _REAP),
    "hc-refit of many experts": ("qwen", _REFIT),
    "reap of many experts": ("qwen", _REAP),
    "layout mapped": ("mixtral", {**_HC, "layout": "mapped"}),
    "layout full": ("mixtral", {**_HC, "layout": "full"}),
    "layout factored": ("mixtral", {**_HC, "compress": "25%,0.9"}),
    "narrower experts": ("mixtral", {**_HC, "expert_width": "50%", "experts": None}),
    "fewer and narrower experts": ("mixtral", {**_REFIT, "expert_width": "50%"}),
    "refit down": ("mixtral", {**_HC, "refit": "down"}),
    "refit on merged states": ("mixtral", {**_REFIT, "propagate": "merged"}),
    "refit down on merged states": ("qwen", {**_REAP, "refit": "down", "propagate": "merged"}),
    "router fit": ("mixtral", {**_HC, "router": "fit"}),
    "router fit on merged states": ("mixtral", {**_HC, "router": "fit", "propagate": "merged"}),
    "zipit": ("mixtral", {**_HC, "merge": "zipit"}),
    "fix-dom": ("mixtral", {**_HC, "merge": "fix-dom"}),
    "alignment by activations": ("mixtral", {**_HC, "align": "activation"}),
    "alignment by weights": ("mixtral", {**_HC, "align": "weight"}),
    "all similarities": ("mixtral", {**_HC, "similarity": "expert-output+weight+router-logits+router-weight"}),
    "Wasserstein distance": ("mixtral", {**_HC, "distance": "wasserstein", "clustering": "single-shot"}),
    "k-means": ("mixtral", {**_HC, "clustering": "kmeans"}),
    "fuzzy clusters": ("mixtral", {**_HC, "clustering": "fuzzy"}),
    "saliency by reconstruction": ("mixtral", {**_REAP, "saliency": "reconstruction"}),
    "saliency by pursuit": ("mixtral", {**_REAP, "saliency": "omp"}),
    "saliency by Gram matrices": ("mixtral", {**_REAP, "saliency": "gram"}),
    "budgets by frequency": ("mixtral", {**_HC, "budget": "frequency", "layout": "mapped"}),
    "statistics written": ("mixtral", {**_HC, "statistics": "written"}),
    "statistics reused": ("mixtral", {**_HC, "statistics": "reused"}),
    "statistics reused for a refit": ("mixtral", {**_REFIT, "statistics": "reused"}),
    "FP8": ("deepseek-fp8", _HC),
    "FP8, refit": ("deepseek-fp8", _REFIT),
    "MXFP4": ("gpt-oss-mxfp4", _HC),
    "MXFP4, refit": ("gpt-oss-mxfp4", _REFIT),
    "as many sequences as tokens": ("mixtral", {**_REAP, "square": True}),
}

# Recipes whose memory is made scarce.
SCARCE = {"reap": _REAP, "hc-smoe": _HC, "hc-refit": _REFIT}

# Function of the product, what it says, what it says after the mistake was planted, and the file where devices mix.
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "tokens that stay on the host": (
        "hcsmoe_hub.pipeline.held_out:measure_results",
        "labels_MS[number, rows].to(held_out.device)",
        "labels_MS[number, rows]",
        "methods/quality/perplexity.py",
    ),
    "outputs that come back too early": (
        "hcsmoe_hub.layer.deviation:_squares",
        "some.to(b.device).float()",
        "some.cpu().float()",
        "layer/deviation.py",
    ),
}
