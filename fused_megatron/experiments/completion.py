"""Scripts that complete the ids and options of `fused-megatron experiment` in a shell."""

from fused_megatron.experiments.catalogue import all_experiments

ACTIONS = ("list", "show", "run", "all", "completion")
SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str) -> str:
    """Return the script of a shell; `source` it, or write it to the shell's folder of completions.

    Args:
        shell: one of SHELLS.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _ids() -> str:
    return " ".join(map(str, all_experiments()))


def _bash() -> str:
    return f"""_fused_megatron() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" choices=""
    if [[ "${{COMP_WORDS[1]}}" == experiment ]]; then
        if (( COMP_CWORD == 2 )); then
            choices="{" ".join(ACTIONS)}"
        elif [[ "${{COMP_WORDS[2]}}" == show || "${{COMP_WORDS[2]}}" == run ]]; then
            choices="{_ids()} --output"
        elif [[ "${{COMP_WORDS[2]}}" == completion ]]; then
            choices="{" ".join(SHELLS)}"
        fi
    elif (( COMP_CWORD == 1 )); then
        choices="experiment"
    fi
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
}}
complete -o default -F _fused_megatron fused-megatron
"""


def _zsh() -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash()}"


def _fish() -> str:
    seen = "__fish_seen_subcommand_from"
    lines = [
        "complete -c fused-megatron -n __fish_use_subcommand -a experiment",
        f'complete -c fused-megatron -f -n "{seen} experiment; and not {seen} {" ".join(ACTIONS)}" '
        f'-a "{" ".join(ACTIONS)}"',
    ]
    for number, each in all_experiments().items():
        title = each.entry.title.replace("'", "")
        lines.append(f"complete -c fused-megatron -f -n \"{seen} show run\" -a {number} -d '{title}'")
    return "\n".join(lines) + "\n"
