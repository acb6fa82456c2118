"""Figures of conversions: what they show, how large they get, and that equal ones have equal bytes."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import pdist, squareform

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.machine.versions import has_matplotlib
from hcsmoe_hub.methods.clustering.clusters import DROPPED, Clusters
from hcsmoe_hub.result import figure
from hcsmoe_hub.result.figure import (
    MAX_LAYERS,
    PALETTE,
    PRUNED,
    cluster_colours,
    cut_height,
    draw,
    expert_order,
    shown_layers,
)

matplotlib = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def clustered(layer: int, experts: int = 8, clusters: int = 4) -> LayerPicture:
    """A layer cut from the dendrogram of random experts."""
    generator = np.random.default_rng(layer)
    distances = pdist(generator.normal(size=(experts, 5)))
    tree = linkage(distances, "average")
    labels = Clusters.of(fcluster(tree, clusters, "maxclust").tolist()).labels
    usage = generator.integers(1, 1000, experts).tolist()
    return LayerPicture(layer=layer, usage=usage, labels=labels, distances_EE=squareform(distances), tree=tree)


def grouped(layer: int, labels: list[int]) -> LayerPicture:
    """A layer with labels and usage only."""
    usage = np.random.default_rng(layer).integers(1, 1000, len(labels)).tolist()
    return LayerPicture(layer=layer, usage=usage, labels=labels, distances_EE=None, tree=None)


def drawn(layers: list[LayerPicture], folder: Path, *, title: str = "A figure") -> Path:
    """The PNG file of some layers."""
    path = folder / f"{len(list(folder.iterdir()))}.png"
    draw(layers, path, title=title)
    return path


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
    return width, height


def colours(path: Path) -> set[str]:
    """Every colour of a picture."""
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(maxcolors=1 << 24)
    return {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in found}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The figure of one layer with all panels."""
    return drawn([clustered(0)], tmp_path_factory.mktemp("plain"))


# Files


def test_the_figure_is_a_png_twice_as_wide_as_a_model_card(plain: Path) -> None:
    width, height = size(plain)
    assert width == 1600
    assert 400 < height < 800
    assert plain.stat().st_size < 150_000


def test_the_colours_of_the_clusters_are_in_the_picture(plain: Path) -> None:
    assert colours(plain) & set(PALETTE) == set(PALETTE[:4])


def test_equal_layers_give_equal_bytes_whatever_the_users_settings(plain: Path, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "black", "savefig.dpi": 50}):
        before = dict(matplotlib.rcParams)
        assert drawn([clustered(0)], tmp_path).read_bytes() == plain.read_bytes()
        assert dict(matplotlib.rcParams) == before


def test_other_layers_give_other_bytes(tmp_path: Path) -> None:
    first, second = (drawn([grouped(layer, [0, 1, 0])], tmp_path).read_bytes() for layer in range(2))
    assert first != second


def test_nothing_names_the_program_or_the_time(plain: Path) -> None:
    with Image.open(plain) as image:
        assert set(image.info) <= {"dpi"}


@pytest.mark.parametrize("title", ["Costs $5 and $6_", ""])
def test_any_title_can_be_drawn(title: str, tmp_path: Path) -> None:
    assert size(drawn([grouped(0, [0, 1, 0])], tmp_path, title=title))[0] == 1600


def test_a_long_title_gets_more_lines(tmp_path: Path) -> None:
    short, long = (size(drawn([grouped(0, [0, 1, 0])], tmp_path, title=title))[1] for title in ("word", "word " * 40))
    assert long > short


# Many layers, many experts


def test_many_layers_stay_below_a_limit_of_pixels(tmp_path: Path) -> None:
    width, height = size(drawn([clustered(layer) for layer in range(48)], tmp_path))
    assert width == 1600
    assert 1600 < height < 2400


def test_the_figure_says_that_layers_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "MAX_LAYERS", 2)
    few, many = (drawn([grouped(0, [0, 1, 0])] * count, tmp_path) for count in (2, 3))
    assert size(many) == size(few)
    assert many.read_bytes() != few.read_bytes()


def test_the_layers_shown_are_evenly_spaced_from_first_to_last() -> None:
    found = [picture.layer for picture in shown_layers([grouped(layer, [0]) for layer in range(48)])]
    assert len(found) == MAX_LAYERS
    assert (found[0], found[-1]) == (0, 47)
    assert set(np.diff(found)) == {4, 5}


def test_up_to_the_limit_all_layers_are_shown() -> None:
    layers = [grouped(layer, [0]) for layer in range(MAX_LAYERS)]
    assert shown_layers(layers) == layers


def test_a_layer_of_512_experts_stays_below_a_megabyte(tmp_path: Path) -> None:
    path = drawn([clustered(0, 512, 256)], tmp_path)
    assert size(path)[1] < 1000
    assert path.stat().st_size < 1_000_000


# Layers that lack something


def test_a_layer_without_distances_is_only_its_bars(plain: Path, tmp_path: Path) -> None:
    bars = drawn([grouped(0, [0, 1, 0, 1])], tmp_path)
    assert size(bars)[1] < size(plain)[1]
    assert colours(bars) & set(PALETTE) == set(PALETTE[:2])


@pytest.mark.parametrize("count", [2, 7])
def test_layers_without_a_dendrogram_are_drawn_next_to_layers_with_one(count: int, tmp_path: Path) -> None:
    full, bars = clustered(0), [grouped(layer, [0, 1, 0]) for layer in range(2, count)]
    squares = LayerPicture(layer=1, usage=full.usage, labels=full.labels, distances_EE=full.distances_EE, tree=None)
    assert size(drawn([full, squares, *bars], tmp_path))[0] == 1600


@pytest.mark.parametrize("count", [1, 7])
def test_pruned_experts_are_grey_and_kept_ones_have_one_colour(count: int, tmp_path: Path) -> None:
    path = drawn([grouped(layer, [0, DROPPED, 1, 2, DROPPED]) for layer in range(count)], tmp_path)
    assert colours(path) & {*PALETTE, PRUNED} == {PALETTE[0], PRUNED}


def test_a_single_expert_without_any_tokens_can_be_drawn(tmp_path: Path) -> None:
    layer = LayerPicture(layer=0, usage=[0], labels=[0], distances_EE=np.zeros((1, 1)), tree=np.zeros((0, 4)))
    assert size(drawn([layer], tmp_path))[0] == 1600


def test_experts_that_are_all_the_same_can_be_drawn(tmp_path: Path) -> None:
    tree = linkage(np.zeros(6), "average")
    layer = LayerPicture(layer=0, usage=[1] * 4, labels=[0, 0, 0, 1], distances_EE=np.zeros((4, 4)), tree=tree)
    assert size(drawn([layer], tmp_path))[0] == 1600


def test_a_figure_of_no_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        draw([], tmp_path / "figure.png", title="Nothing")


def test_arrays_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="Layer 3 has 2 labels"):
        LayerPicture(layer=3, usage=[1, 2], labels=[0, 1], distances_EE=np.zeros((3, 3)), tree=None)


# Order and colours


def test_experts_follow_the_leaves_of_the_dendrogram() -> None:
    layer = clustered(0, 12)
    assert layer.tree is not None
    assert expert_order(layer) == leaves_list(layer.tree).tolist()


def test_without_a_dendrogram_experts_are_ordered_by_cluster_and_pruned_ones_come_last() -> None:
    assert expert_order(grouped(0, [0, DROPPED, 1, 0, 2])) == [0, 3, 2, 4, 1]


def test_where_nothing_was_merged_the_most_used_expert_comes_first() -> None:
    layer = LayerPicture(layer=0, usage=[5, 9, 1, 9], labels=[0, 1, -1, 2], distances_EE=None, tree=None)
    assert expert_order(layer) == [1, 3, 0, 2]


@pytest.mark.parametrize("clusters", [1, 2, len(PALETTE)])
def test_every_cluster_has_its_own_colour_up_to_the_size_of_the_palette(clusters: int) -> None:
    found = cluster_colours(clustered(clusters, 20, clusters))
    assert found.keys() == {DROPPED, *range(clusters)}
    assert len(set(found.values())) == clusters + 1


@pytest.mark.parametrize("seed", range(2))
def test_neighbours_never_share_a_colour(seed: int) -> None:
    layer = clustered(seed, 60, 40)
    found = cluster_colours(layer)
    labels = [layer.labels[expert] for expert in expert_order(layer)]
    borders = [(left, right) for left, right in pairwise(labels) if left != right]
    assert len(borders) >= 39
    assert all(found[left] != found[right] for left, right in borders)


# The cut


@pytest.mark.parametrize("seed", range(4))
def test_cutting_at_the_line_gives_the_clusters(seed: int) -> None:
    layer = clustered(seed, 24, 2 + 3 * seed % 20)
    assert layer.tree is not None
    height = cut_height(layer.tree, layer.labels)
    assert height is not None
    assert Clusters.of(fcluster(layer.tree, height, "distance").tolist()).labels == layer.labels


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 2, 2]])
def test_clusters_without_a_cut_have_no_line(labels: list[int]) -> None:
    tree = linkage(np.array([[0.0], [1.0], [10.0], [12.0]]), "average")
    assert cut_height(tree, labels) is None


# The library


def test_asking_for_matplotlib_does_not_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib")
    assert has_matplotlib()
    assert "matplotlib" not in sys.modules


def test_drawing_does_not_import_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    drawn([grouped(0, [0, 1, 0])], tmp_path)
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_a_figure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsmoe_hub.machine.versions.find_spec", lambda name: None)
    assert not has_matplotlib()
    with pytest.raises(PlanError, match="not installed"):
        draw([clustered(0)], tmp_path / "figure.png", title="None")
