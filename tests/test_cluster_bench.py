"""The bench of a cluster runs here in small."""

from pipelines.bench.cluster import manifest_cost


def test_a_simulated_store_is_resumed_committed_and_opened(capsys):
    seconds, mib = manifest_cost(300)
    assert seconds >= 0
    assert mib > 0
    told = capsys.readouterr().out
    assert [line.split(":")[0] for line in told.splitlines()] == ["resume", "commit", "open"]
