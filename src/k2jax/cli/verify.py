"""`k2jax verify`."""

from k2jax.errors import RunFailed, UserError


def verify(args, rest: list[str]) -> int:
    """Check the files of committed steps, and of damaged ones name the arrays."""
    from k2jax.runs.commits import check_committed, committed_steps, damage
    from k2jax.runs.folder import read_config
    from k2jax.runs.mirror import open_run_folder
    from k2jax.train.restore import damaged_arrays

    files, bad = open_run_folder(args.run), []
    read_config(files.path)
    folder = files.checkpoints
    steps = committed_steps(folder)
    check_committed(steps, args.step)
    for step in steps if args.step is None else [args.step]:
        problems = damage(folder, step)
        if problems:
            bad.append(step)
            try:
                problems += damaged_arrays(folder, step) or ["no array is damaged: the bits are in none, or beside them"]
            except UserError:
                pass  # the record itself, of which `damage` has told
        print("\n".join([f"step {step}: {'DAMAGED' if problems else 'sound'}", *(f"  {problem}" for problem in problems)]))
    if bad:
        raise RunFailed(f"{len(bad)} of {len(steps)} committed steps are damaged; a resume sets the newest of them aside")
    return 0
