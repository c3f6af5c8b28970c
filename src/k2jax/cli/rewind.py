"""`k2jax rewind`."""


def rewind(args, rest: list[str]) -> int:
    """Take a run back to an earlier step, and say how to go on."""
    from k2jax.runs import rewind as runs

    done = runs.rewind(args.run, args.to, tuple(args.skip.split(",")) if args.skip else ())
    print(f"rewound from step {done.newest} to step {done.step}; what came after is in {done.aside}")
    options = " --data.skip-steps " + ",".join(done.skip) if done.skip else ""
    print("resume with the command that trained it" + (f" and{options}" if options else ""))
    return 0
