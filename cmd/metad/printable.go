package main

import (
	"fmt"
	"io"
	"strings"
	"unicode"
)

// printable passes text on to a terminal without what a terminal would obey: names come from
// labels, which anybody may set, and answers from whatever has a port. A control character is shown
// by its number, as in JSON; line ends and tabs stay. Each Write must hold whole characters.
type printable struct{ w io.Writer }

// Write implements io.Writer.
func (p printable) Write(b []byte) (int, error) {
	if _, err := io.WriteString(p.w, shown(string(b), "\n\t")); err != nil {
		return 0, err
	}
	return len(b), nil
}

// oneLine returns s as it is shown in a table.
func oneLine(s string) string { return shown(s, "") }

// shown returns s with the number in place of every character that is neither printable nor in
// keep.
func shown(s, keep string) string {
	bad := func(r rune) bool { return !unicode.IsPrint(r) && !strings.ContainsRune(keep, r) }
	if strings.IndexFunc(s, bad) < 0 {
		return s
	}
	var out strings.Builder
	for _, r := range s {
		switch {
		case !bad(r):
			out.WriteRune(r)
		case r > 0xffff:
			fmt.Fprintf(&out, `\U%08x`, r)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
	}
	return out.String()
}
