"""Early stopping that survives a kill: measurements come in, the end of the run goes out."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback

STATE_NAME = "EarlyStopping"
"""Key of its state in `trainer_state.json`: transformers uses the class's name."""


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' own, with its count in the checkpoint, and a checkpoint where it stops."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on counting from the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(STATE_NAME) if state.global_step else None
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"] if saved else 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Count, and stop with a checkpoint."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop:
            control.should_save = True


def has_stopped(state: dict[str, Any]) -> bool:
    """Whether the run of this `trainer_state.json` was ended early."""
    saved = state["stateful_callbacks"].get(STATE_NAME)
    if saved is None:
        return False
    return saved["attributes"]["early_stopping_patience_counter"] >= saved["args"]["early_stopping_patience"]
