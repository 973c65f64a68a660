"""What controls of the gate must end as: the arithmetic, on hand-made verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from bench import controls


@pytest.mark.parametrize(("name", "codes", "right"), [
    ("noise", ("faces", "copies"), True), ("noise", ("identity",), False), ("unseen photos", ("accepted",), True), ("unseen photos", ("identity",), False),
    ("honest", ("accepted",), True), ("honest", ("drift",), False), ("overfitted", ("copies",), True), ("overfitted", ("accepted",), False)])
def test_what_a_control_must_end_as(name: str, codes: tuple[str, ...], right: bool) -> None:
    assert controls.ended_right(name, {"kind": "accepted" if codes == ("accepted",) else "retry", "reasons": list(codes), "scores": {}}) is right


def test_networks_look_at_a_picture_once() -> None:
    class Network:
        name, licence = "counting", "none"
        looked = 0

        def find_faces(self, picture: object) -> list[object]:
            self.looked += 1
            return []

    network = Network()
    once, picture = controls.Remembering(network), np.zeros((4, 4, 3), np.uint8)
    assert once.find_faces(picture) == once.find_faces(picture.copy()) == []
    assert network.looked == 1
    once.find_faces(picture + 1)
    assert network.looked == 2
