"""Names of the files that stand next to the weights of a result."""

REPORT_FILE = "hcsmoe.json"
EVALUATION_FILE = "hcsmoe-evaluation.json"
FIGURE_FILE = "hcsmoe.png"
# No program loads a file of this kind as weights.
NEURONS_FILE = "hcsmoe-neurons.npz"
SINGULAR_VALUES_FILE = "hcsmoe_singular_values.png"
CARD_FILE = "README.md"
# One file of our own: the others in its folder are other people's results.
BENCHMARK_FILE = ".eval_results/hcsmoe.yaml"
