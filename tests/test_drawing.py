"""The drawing of a network: a standing-alone SVG that shows every layer."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from space.architecture import parse_architecture
from space.drawing import architecture_svg
from space.mnasnet import PUBLISHED, published

SVG = "{http://www.w3.org/2000/svg}"


def bars(root: ET.Element, kind: str) -> list[ET.Element]:
    return [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == kind
            and rect.get("rx")]  # fmt: skip


def labels(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_layer_is_a_bar_of_its_operation(name: str) -> None:
    network = published(name)
    root = ET.fromstring(architecture_svg(network))
    layers = network.layers()
    for op in ("conv", "dconv", "mbconv"):
        assert len(bars(root, op)) == sum(layer.op == op for layer in layers)
    caps = sum(layer.se_filters > 0 for layer in layers)
    assert len(bars(root, "se")) == caps + 1  # and the legend's
    arcs = [path for path in root.iter(f"{SVG}path") if path.get("class") == "arc"]
    assert len(arcs) == sum(layer.skip == "identity" for layer in layers) + 1


def test_labels_say_what_a_stage_is() -> None:
    texts = labels(ET.fromstring(architecture_svg(published("mnasnet-a1"))))
    assert "3 × MBConv3 5×5" in texts
    assert "DWSep 3×3" in texts
    assert "SE 0.25" in texts
    assert "28×28 px" in texts
    assert "3,887,038 parameters, 311,579,072 multiply-adds, hash 803f39f196126f96" in texts


def test_a_bar_is_taller_for_a_larger_map_and_wider_for_more_channels() -> None:
    root = ET.fromstring(architecture_svg(published("mnasnet-b1")))
    drawn = bars(root, "mbconv")
    heights = [float(bar.get("height", 0)) for bar in drawn]
    widths = [float(bar.get("width", 0)) for bar in drawn]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] > heights[-1]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


EXTREMES = {
    "smallest": "stem1 | r1_k1_s11_e1_i1_o1_noskip | head1 | r2 | c2",
    "deep": "stem8_s11 | r500_k3_s11_e6_i8_o8_se0.25_pool | head64 | r28 | c10 | in1",
    "wide": "stem8 | r1_k3_s11_e1_i8_o60000_noskip_conv | head65536 | r4096 | c1000000",
    "many": "stem8 | " + "r1_k3_s11_e1_i8_o8 | " * 100 + "head8 | r32 | c10",
}


@pytest.mark.parametrize("text", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_networks_stay_inside_the_drawing(text: str) -> None:
    root = ET.fromstring(architecture_svg(parse_architecture(text)))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("x"):
            x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
            assert 0 <= x <= x + float(rect.get("width", 0)) <= width
            assert 0 <= y <= y + float(rect.get("height", 0)) <= height


def test_many_equal_layers_are_folded_and_counted() -> None:
    network = parse_architecture(EXTREMES["deep"])
    root = ET.fromstring(architecture_svg(network))
    assert len(bars(root, "mbconv")) == 8
    assert "+493" in labels(root)
    assert "500 × MBConv6 3×3" in labels(root)


def test_the_drawing_refers_to_nothing_outside_itself() -> None:
    text = architecture_svg(published("mnasnet-a1"))
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "href" not in text
    assert "<script" not in text
