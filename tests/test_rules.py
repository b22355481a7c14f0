"""Which settings suit which data and machine."""

from dataclasses import replace

import pytest
from conftest import ROOT

from training.rules import (
    ENOUGH_WINDOWS,
    FEW_WINDOWS,
    GB,
    GROUPS,
    NETWORKS,
    PAPER_EPOCHS,
    Situation,
    networks_for,
    settings_for,
    too_few_validated,
    too_few_windows,
    wanted_epochs,
    what_does_not_fit,
)
from training.settings import Settings

LAPTOP = Situation(num_pairs=300, side=1000, object_side=0.3, device="cpu", memory=8 * GB, disk=100 * GB)
T4 = Situation(num_pairs=4040, side=900, object_side=0.2, device="cuda", memory=15.5 * GB, disk=100 * GB)
SITUATIONS = {
    "20 photographs on a laptop": replace(LAPTOP, num_pairs=20),
    "CAMO on two cores": replace(LAPTOP, num_pairs=1000, side=448),
    "COD10K on 8 GB": replace(T4, memory=7.5 * GB),
    "COD10K on a T4": T4,
    "COD10K on 24 GB": replace(T4, memory=23 * GB),
    "COD10K on 80 GB": replace(T4, memory=79 * GB),
    "COD10K on 8 x 80 GB": replace(T4, memory=79 * GB, num_ranks=8),
    "a trained network": replace(LAPTOP, start_from="best_model.pth"),
    "a named backbone": replace(T4, backbone="resnet50"),
}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_every_recommendation_is_accepted_by_train(situation: Situation) -> None:
    networks = networks_for(situation)
    assert networks
    for network in networks:
        chosen = settings_for(situation, network)
        values = {name: value for name, (value, _) in chosen.items()}
        settings = Settings.resolve({"dataset_path": "x", **values})
        epochs, _ = wanted_epochs(situation, round(0.9 * situation.num_pairs), settings.batch_size)
        settings = Settings.resolve({**settings.to_dict(), "epochs": epochs})
        assert all(rule.why for _, rule in chosen.values())


def test_more_memory_gets_a_more_able_network() -> None:
    first = {name: networks_for(situation)[0].settings for name, situation in SITUATIONS.items()}
    assert first["COD10K on 8 GB"] == {"backbone": "pvt_v2_b2", "img_size": 384, "batch_size": 8}
    assert first["COD10K on a T4"]["zoom"] == first["COD10K on 24 GB"]["zoom"] == [0.5, 1.0, 1.5]
    assert first["COD10K on 80 GB"]["backbone"] == "pvt_v2_b4"
    assert first["CAMO on two cores"]["backbone"] == "tf_efficientnet_lite0"


def test_what_the_user_names_is_kept() -> None:
    assert {rule.settings["backbone"] for rule in networks_for(SITUATIONS["a named backbone"])} == {"resnet50"}
    trained = SITUATIONS["a trained network"]
    assert all({"backbone", "zoom"}.isdisjoint(rule.settings) for rule in networks_for(trained))
    assert settings_for(trained, networks_for(trained)[0])["lr"][0] == 0.0003


def test_photographs_are_not_enlarged_beyond_their_size() -> None:
    sizes = [rule.settings["img_size"] for rule in networks_for(replace(LAPTOP, side=200))]
    assert sizes == [224, 160]


def test_small_objects_are_shown_larger() -> None:
    assert networks_for(LAPTOP)[0].settings["img_size"] == 352
    assert networks_for(replace(LAPTOP, object_side=0.1))[0].settings["img_size"] == 448


def test_steps_of_several_gpus_have_a_higher_rate_and_a_shorter_average() -> None:
    one, eight = (SITUATIONS[name] for name in ("COD10K on 80 GB", "COD10K on 8 x 80 GB"))
    alone, together = (settings_for(situation, networks_for(situation)[0]) for situation in (one, eight))
    assert together["lr"][0] == pytest.approx(alone["lr"][0] * 8**0.5, rel=1e-3)
    assert together["ema_decay"][0] == pytest.approx(0.999**8, abs=1e-5)


def test_a_cache_needs_room() -> None:
    assert settings_for(LAPTOP, networks_for(LAPTOP)[0])["cache"][0] is True
    full = replace(LAPTOP, disk=0.1 * GB)
    assert "cache" not in settings_for(full, networks_for(full)[0])


def test_few_photographs_get_many_epochs_and_many_get_those_of_papers() -> None:
    epochs, _ = wanted_epochs(SITUATIONS["20 photographs on a laptop"], 16, 4)
    assert epochs * 4 == ENOUGH_WINDOWS
    assert wanted_epochs(LAPTOP, 900, 8)[0] == 15
    assert wanted_epochs(T4, 3636, 8)[0] == PAPER_EPOCHS


def test_evidence_is_a_document() -> None:
    for rule in (*NETWORKS, *(rule for group in GROUPS for rule in group)):
        assert not rule.evidence or (ROOT / rule.evidence).is_file(), rule


def test_settings_that_do_not_fit_are_named() -> None:
    assert "10 optimizer steps" in what_does_not_fit(20, 10, is_default=False)
    assert "default schedule" in what_does_not_fit(500, 9000, is_default=True)
    assert not what_does_not_fit(500, 900, is_default=False)
    assert not what_does_not_fit(4000, 70_000, is_default=True)


def test_what_there_is_enough_of_is_not_mentioned() -> None:
    assert too_few_windows(FEW_WINDOWS, 20, 6) == too_few_validated(30) == ""
