"""What TensorBoard got of a run, read by TensorBoard itself."""


def scalars(folder):
    """(step, value) of every event under a name, by step, those of all files, nothing purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in (folder / "tensorboard").glob("events*"):  # their names tell seconds, not the order
        events = EventAccumulator(str(file), purge_orphaned_data=False)
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((e.step, e.value) for e in events.Scalars(name))
    return {name: sorted(events) for name, events in found.items()}
