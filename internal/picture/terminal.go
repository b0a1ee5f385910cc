// Package picture draws the pictures of the documentation as SVG: what is on a terminal, and a
// dashboard's charts.
package picture

import (
	"encoding/xml"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The size of a character, in pixels.
const (
	charWidth  = 8
	lineHeight = 17
	margin     = 10
)

const (
	background = "#11151c"
	foreground = "#c9d1d9"
)

// colours are the eight of a terminal.
var colours = [8]string{"#484f58", "#ff7b72", "#56d364", "#e3b341", "#6ca4f8", "#db61a2", "#56d4dd",
	foreground}

// look is how text looks.
type look struct {
	colour               string
	bold, faint, reverse bool
}

// sgr is what tmux prints of attributes.
var sgr = regexp.MustCompile(`\x1b\[([0-9;]*)m`)

// Terminal draws what `tmux capture-pane -e -p` prints of a terminal of so many columns.
func Terminal(captured string, columns int) []byte {
	lines := strings.Split(strings.TrimRight(captured, "\n"), "\n")
	var b strings.Builder
	begin(&b, columns*charWidth+2*margin, len(lines)*lineHeight+2*margin)
	var l look
	for row, line := range lines {
		column := 0
		for line != "" {
			at := sgr.FindStringSubmatchIndex(line)
			text := line
			if at != nil {
				text = line[:at[0]]
			}
			run(&b, text, l, column, row)
			column += utf8.RuneCountInString(text)
			if at == nil {
				break
			}
			l.change(line[at[2]:at[3]])
			line = line[at[1]:]
		}
	}
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

func begin(b *strings.Builder, width, height int) {
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" `+
		`viewBox="0 0 %[1]d %[2]d">`+"\n", width, height)
	fmt.Fprintf(b, `<rect width="%d" height="%d" rx="6" fill="%s"/>`+"\n", width, height,
		background)
}

// change takes the numbers of one sequence.
func (l *look) change(numbers string) {
	for _, n := range strings.Split(numbers, ";") {
		switch n, _ := strconv.Atoi(n); {
		case n == 0:
			*l = look{}
		case n == 1:
			l.bold = true
		case n == 2:
			l.faint = true
		case n == 7:
			l.reverse = true
		case n == 22:
			l.bold, l.faint = false, false
		case n == 27:
			l.reverse = false
		case 30 <= n && n <= 37:
			l.colour = colours[n-30]
		case n == 39:
			l.colour = ""
		}
	}
}

// run draws text of one look.
func run(b *strings.Builder, text string, l look, column, row int) {
	width := utf8.RuneCountInString(text) * charWidth
	x, y := margin+column*charWidth, margin+row*lineHeight
	ink := l.colour
	if ink == "" {
		ink = foreground
	}
	if l.reverse && width > 0 {
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x, y,
			width, lineHeight, ink)
		ink = background
	}
	if strings.TrimSpace(text) == "" {
		return
	}
	style := ""
	if l.bold {
		style += ` font-weight="bold"`
	}
	if l.faint {
		style += ` opacity="0.6"`
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" textLength="%d" lengthAdjust="spacingAndGlyphs" `+
		`font-family="monospace" font-size="13" xml:space="preserve" fill="%s"%s>%s</text>`+
		"\n", x, y+13, width, ink, style, escaped(text))
}

func escaped(text string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(text)) // a strings.Builder takes everything
	return b.String()
}
