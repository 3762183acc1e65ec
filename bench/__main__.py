from .cli import main

main(prog_name="gpurnn bench")
