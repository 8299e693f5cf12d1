"""`python -m llm_dynamics.cli` is `llm-dynamics`."""

from llm_dynamics.cli import main

main()
