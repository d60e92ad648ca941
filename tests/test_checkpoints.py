"""Which checkpoint a run continues from."""

from common.checkpoints import last_complete_checkpoint


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, state in ((1, "{}"), (2, '{"global_step": '), (10, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "run_state.json").write_text("{}")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-1"
    assert last_complete_checkpoint(tmp_path / "none") is None
