import pytest

from unified_lm.config.schema import OptimConfig
from unified_lm.engine.schedule import learning_rate


def rates(total: int = 10, **settings) -> list[float]:
    config = OptimConfig(learning_rate=1.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_linear_decay_covers_the_steps_really_taken():
    values = rates()
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)


def test_warmup_grows_from_the_first_step_to_the_peak():
    assert rates(warmup_steps=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates(warmup_ratio=0.4) == rates(warmup_steps=4)


def test_a_horizon_beyond_the_last_step_keeps_the_rate_high():
    assert rates(horizon_steps=1000)[-1] == pytest.approx(0.991)


def test_cosine_and_constant():
    assert rates(schedule="constant") == [1.0] * 10
    cosine = rates(schedule="cosine", final_ratio=0.1)
    assert cosine[5] == pytest.approx(0.55)
    assert min(cosine) > 0.1
