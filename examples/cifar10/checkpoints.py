"""What a run needs to go on bit for bit, kept after every epoch."""

from pathlib import Path

import orbax.checkpoint as ocp
import report
import steps


class Checkpoints:
    """The checkpoints of a run: orbax writes each whole or not at all."""

    def __init__(self, run: Path):
        self.manager = ocp.CheckpointManager(
            (run / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
            ),
        )

    def save(self, carry: steps.Carry, history: list[dict]) -> None:
        arguments = ocp.args.Composite(
            carry=ocp.args.StandardSave(carry), history=ocp.args.JsonSave({"epochs": history})
        )
        self.manager.save(len(history), args=arguments)

    def restore(self, carry: steps.Carry) -> tuple[steps.Carry, list[dict]]:
        """The last whole checkpoint, or `carry` and no history where there is none."""
        epoch = self.manager.latest_step()
        if epoch is None:
            return carry, []
        arguments = ocp.args.Composite(carry=ocp.args.StandardRestore(carry), history=ocp.args.JsonRestore())
        restored = self.manager.restore(epoch, args=arguments)
        report.console.print(f"Going on after epoch {epoch}.")
        return restored["carry"], restored["history"]["epochs"]
