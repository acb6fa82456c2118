"""The papers whose method a result follows."""

from dataclasses import dataclass

from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.options import Align, Budget, Clustering, Merge, Saliency, Similarity


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A paper.

    Attributes:
        name: What its method is called.
        tag: The same as a tag of the Hub.
        url: Its page.
        bibtex: Its entry.
    """

    name: str
    tag: str
    url: str
    bibtex: str

    @property
    def link(self) -> str:
        """Name for Markdown."""
        return f"[{self.name}]({self.url})"


HC_SMOE = Paper(
    name="HC-SMoE",
    tag="hc-smoe",
    url="https://arxiv.org/abs/2410.08589",
    bibtex="""@inproceedings{chen2025hcsmoe,
  title     = {Retraining-Free Merging of Sparse {MoE} via Hierarchical Clustering},
  author    = {Chen, I-Chun and Liu, Hsu-Shen and Sun, Wei-Fang and Chao, Chen-Hao and Hsu, Yen-Chang and Lee, Chun-Yi},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  pages     = {8594--8620},
  year      = {2025},
  url       = {https://arxiv.org/abs/2410.08589}
}""",
)
M_SMOE = Paper(
    name="M-SMoE",
    tag="m-smoe",
    url="https://arxiv.org/abs/2310.01334",
    bibtex="""@inproceedings{li2024msmoe,
  title     = {Merge, Then Compress: Demystify Efficient {SMoE} with Hints from Its Routing Policy},
  author    = {Li, Pingzhi and Zhang, Zhenyu and Yadav, Prateek and Sung, Yi-Lin and Cheng, Yu and Bansal, Mohit and
               Chen, Tianlong},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2310.01334}
}""",
)
REAP = Paper(
    name="REAP",
    tag="reap",
    url="https://arxiv.org/abs/2510.13999",
    bibtex="""@misc{lasby2025reap,
  title         = {{REAP} the Experts: Why Pruning Prevails for One-Shot {MoE} Compression},
  author        = {Lasby, Mike and Lazarevich, Ivan and Sinnadurai, Nish and Lie, Sean and Ioannou, Yani and
                   Thangarasa, Vithursan},
  year          = {2025},
  eprint        = {2510.13999},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2510.13999}
}""",
)
ZIPIT = Paper(
    name="ZipIt!",
    tag="zipit",
    url="https://arxiv.org/abs/2305.03053",
    bibtex="""@inproceedings{stoica2024zipit,
  title     = {{ZipIt}! Merging Models from Different Tasks without Training},
  author    = {Stoica, George and Bolya, Daniel and Bjorner, Jakob and Ramesh, Pratik and Hearn, Taylor and
               Hoffman, Judy},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2305.03053}
}""",
)

# Grouping that HC-SMoE describes, itself or in its ablations; single-shot grouping is that of M-SMoE.
_HC_CLUSTERINGS = frozenset({Clustering.HIERARCHICAL, Clustering.KMEANS, Clustering.FUZZY})
_HC_MERGES = frozenset({Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE})


def papers(card: CardData) -> list[Paper]:
    """The papers in force; none where no layer has fewer experts."""
    recipe = card.recipe
    if not card.changed:
        return []
    if card.is_pruned:
        return [REAP] if recipe.saliency is Saliency.REAP else []
    is_hc = recipe.clustering in _HC_CLUSTERINGS or recipe.merge in _HC_MERGES or recipe.budget is Budget.FREQUENCY
    is_m = (
        recipe.clustering is Clustering.SINGLE_SHOT
        or recipe.budget is Budget.M_SMOE
        or recipe.align is Align.WEIGHT
        or Similarity.ROUTER_LOGITS in (recipe.similarity or ())
        or recipe.compress is not None
    )
    found = ((HC_SMOE, is_hc), (M_SMOE, is_m), (ZIPIT, recipe.merge is Merge.ZIPIT))
    return [paper for paper, is_used in found if is_used]
