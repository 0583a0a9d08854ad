# Flattens one JSON document into lines of "path<TAB>value", e.g. "networks.0.ip_address<TAB>10.80.3.7". A newline,
# a tab and a backslash inside of a string stay escaped, so that one value is one line; `printf %b` restores them.

function fail(why) {
    print "json: " why ", found '" token "'" > "/dev/stderr"
    failed = 1
    exit 1
}

function advance() {
    sub(/^[ \t\r\n]+/, "", text)
    if (!match(text, /^"([^"\\]|\\.)*"/) && !match(text, /^[^][{}:,"[:space:]]+/)) match(text, /^./)
    token = RSTART ? substr(text, 1, RLENGTH) : ""
    text = RSTART ? substr(text, RLENGTH + 1) : ""
}

function expect(wanted) {
    if (token != wanted) fail("expected '" wanted "'")
    advance()
}

function code_point(hex,    i, n) {
    for (i = 1; i <= 4; i++) n = n * 16 + index("0123456789abcdef", tolower(substr(hex, i, 1))) - 1
    if (n == 10) return "\\n"
    if (n == 9) return "\\t"
    if (n == 92) return "\\\\"
    if (n < 32 || n == 127) return ""
    if (n < 128) return sprintf("%c", n)
    if (n < 2048) return sprintf("%c%c", 192 + int(n / 64), 128 + n % 64)
    if (n >= 55296 && n < 57344) return "?"  # half of a surrogate pair: nothing we use has one
    return sprintf("%c%c%c", 224 + int(n / 4096), 128 + int(n / 64) % 64, 128 + n % 64)
}

function unquote(s,    out, c) {
    s = substr(s, 2, length(s) - 2)
    while (match(s, /\\./)) {
        c = substr(s, RSTART + 1, 1)
        out = out substr(s, 1, RSTART - 1)
        s = substr(s, RSTART + 2)
        if (c == "u") {
            out = out code_point(substr(s, 1, 4))
            s = substr(s, 5)
        } else if (c == "n" || c == "t" || c == "\\") out = out "\\" c
        else if (c != "b" && c != "f" && c != "r") out = out c
    }
    return out s
}

function value(path,    key, i) {
    if (token == "{") {
        advance()
        while (token != "}") {
            if (token !~ /^"/) fail("expected a key")
            key = unquote(token)
            advance()
            expect(":")
            value(path == "" ? key : path "." key)
            if (token != "}") expect(",")
        }
    } else if (token == "[") {
        advance()
        for (i = 0; token != "]"; i++) {
            value(path "." i)
            if (token != "]") expect(",")
        }
    } else if (token ~ /^"./) print path "\t" unquote(token)
    else if (token ~ /^[-+.0-9A-Za-z]+$/) print path "\t" token
    else fail("expected a value")
    advance()
}

{ text = text $0 "\n" }

END {
    if (failed) exit 1
    advance()
    value("")
    if (token != "") fail("expected the end")
}
