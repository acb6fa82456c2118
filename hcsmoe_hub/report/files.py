"""Names of the files that stand next to the weights of a result."""

REPORT_FILE = "hcsmoe.json"
EVALUATION_FILE = "hcsmoe-evaluation.json"
FIGURE_FILE = "hcsmoe.png"
CARD_FILE = "README.md"
# One file of our own: the others in its folder are other people's results.
BENCHMARK_FILE = ".eval_results/hcsmoe.yaml"
