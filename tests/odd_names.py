"""Names that folders have, and that a program may read as a pattern, an option, an address or a temporary file."""

ODD_NAMES = (
    "shop [2026]", "[a-z]", "[!x]", "]", "*", "**", "what?", "back\\slash", "\\[2026\\]",  # patterns
    "two  spaces", " leading space", "trailing space ", "trailing dot.", "...", "-leading-dash", "--workdir=x",
    "it's", 'say "hi"', "#1", "100%", "%20", "%s %(name)s", "$HOME", "${HOME}", "~", "~root", "`id`", "a;b|c&d", "<a>",
    "!", "^", "@eaDir", "a=b", "a,b", "a:b", "logs:", "gs:", "s3:", "{}", "{0}", "{name}", "(1)",
    "line\nbreak", "tab\there", "return\rhere", "escape\x1b[31m", "\x7f", "shop 🛒", "חנות", "متجر\u202e", "店",
    "cafe\u0301", "caf\u00e9", "zero\u200bwidth", "no\u00a0break",
    "7", "con", "nul", "checkpoints", "x.damaged", "x.deleted", "x.orbax-checkpoint-tmp", "x.__lock", "d", "x.tmp",
    "ocdbt.process_0", "x" * 255, "é" * 127,
)  # fmt: skip
