"""Import datasets of other tools (DistillKit, axolotl), and export datasets for other tools."""
