"""Tables and figures say what the lines do."""

import numpy as np

from studies import figures


def rows(**changes):
    same = {"what": "scores", "frames": 10, "context": 2, "train_steps": 2, "cfg_temporal": 1.5}
    same |= {"frame_noise": 0.3, "order": "random", "steps": 1, "flops": 2e6, "floor": 5.0}
    same |= {"frechet": 9.0, "psnr": None, "hue_by_frame": [1.0, 2.0], **changes}
    return [
        same | {"arm": arm, "seed": seed, "right": right}
        for arm, seed, right in (("a", 0, 0.5), ("a", 1, 0.75), ("b", 1, 0.65), ("b", 0, 0.4))
    ]


def test_a_mean_is_written_to_two_digits_of_its_deviation():
    def written(*values):
        return figures.mean(np.array(values))

    assert written(35, 36, 37.4) == "36.1 ± 1.2" and written(10, 210) == "110 ± 141"
    assert written(0.86, 0.8601) == "0.860050 ± 0.000071" and written(0.12345) == "0.123"
    assert written(2.0, 2.0) == "2.000 ± 0.000" and written(1.0, np.nan) == ""
    assert written(1.0, 2.0) == "1.50 ± 0.71"


def test_a_table_has_a_line_a_cell_and_no_column_that_was_never_measured():
    head, _, first, second = figures.table(rows()).splitlines()
    assert "PSNR" not in head and "sharpness" not in head and "hue error" in head
    assert first.startswith(
        "| a | 2 | 1.5 | 0.3 | random | 1 | 2 | 2 | 9.000 ± 0.000 | 0.62 ± 0.18 |"
    )
    assert first.endswith("| 2.000 ± 0.000 |") and second.startswith("| b | 2 |")


def test_long_rollouts_other_parts_and_shorter_trainings_are_kept_apart():
    usual, long, tuning = rows(), rows(frames=24), rows(what="tuning")
    every = usual + long + tuning + rows(train_steps=1)
    assert figures.scored(every) == usual + rows(train_steps=1)
    assert figures.scored(every, long=True) == long
    assert figures.whole(every) == usual + long + tuning


def test_losses_are_told_by_arm_and_level_of_noise():
    losses = {"diffusion@0.1": 0.5, "diffusion@1.0": 1.0, "canvas": 0.2}
    found = [
        {
            "arm": arm,
            "seed": seed,
            "train_steps": 2,
            "frame_noise": noise,
            "losses": {k: v * scale for k, v in losses.items()},
        }
        for arm, seed, scale, noise in (
            ("a", 0, 1.0, 0.3),
            ("uniform", 0, 2.0, 0.3),
            ("uniform", 1, 2.5, 0.3),
            ("a", 0, 9.0, 0.0),  # no other seed: another level
        )
    ]
    _, _, first, second, third = figures.losses_table(found).splitlines()
    assert first == "| a | 2 | 0.3 | 1 | 0.500 | 1.000 | 0.200 |"
    assert second.startswith("| uniform | 2 | 0.3 | 2 | 1.12 ± 0.18 | ")
    assert third.startswith("| a | 2 | 0.0 | 1 | 4.500 | ")


def test_the_claim_is_a_difference_seed_by_seed_with_its_confidence_interval():
    few, many = rows(steps=2, flops=1e6, speed=1.0), rows(steps=8, flops=4e6, speed=1.0)
    few[0]["right"] = 0.6  # the differences are 0.2 and 0.1, their deviation 0.0707
    way = {"cfg_temporal": 1.0, "flops": 1e6, "speed": 1.0}  # of more S, of fewer cells
    other_way = [rows(steps=steps, **way)[0] for steps in (1, 2, 4)]
    table = figures.claim_table(few + other_way + many, "b").splitlines()
    head, _, frechet, right, speed, *own = table
    assert head.startswith("| arm, S = 2 | cost over b, S = 8 | score |")
    assert frechet.startswith("| a | 0.25 | Fréchet") and frechet.endswith("| 0, 0 | 0 ± 0 |")
    assert right == "| a | 0.25 | correct frames | 0.2, 0.1 | 0.15 ± 0.64 |"
    one = figures.claim_table([row for row in few + many if row["seed"] == 0], base="b")
    assert one.splitlines()[3].endswith("| 0.2 |  |") and speed.endswith("| 0, 0 | 0 ± 0 |")
    assert len(own) == 3 and all(row.startswith("| b | 0.25 | ") for row in own)
