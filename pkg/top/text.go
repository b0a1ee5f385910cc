package top

import (
	"fmt"
	"strings"

	"github.com/charmbracelet/x/ansi"
)

// size is a number of bytes, in at most six characters.
func size(v float64) string {
	const units = "BKMGTPE"
	i := 0
	for v >= 1000 && i < len(units)-1 {
		v /= 1024
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.1f%c", v, units[i])
}

// count is a number a second.
func count(v float64) string {
	if v == 0 || v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.1f", v)
}

// fit cuts text to width, or fills it up with spaces.
func fit(text string, width int) string {
	text = ansi.Truncate(text, width, "…")
	return text + strings.Repeat(" ", max(0, width-ansi.StringWidth(text)))
}

// fitRight is fit with the spaces in front.
func fitRight(text string, width int) string {
	text = ansi.Truncate(text, width, "…")
	return strings.Repeat(" ", max(0, width-ansi.StringWidth(text))) + text
}

// sparkline draws the last points, one character each. The highest of them has the full height, if
// it is not below the metric's floor.
func (m *metric) sparkline(points []point, width int) string {
	points = points[max(0, len(points)-width):]
	values := make([]float32, len(points))
	highest := m.floor
	for i := range points {
		for _, k := range m.of {
			values[i] += points[i][k]
		}
		highest = max(highest, values[i])
	}
	bars := []rune("▁▂▃▄▅▆▇█")
	var b strings.Builder
	b.WriteString(strings.Repeat(" ", width-len(points)))
	for _, v := range values {
		b.WriteRune(bars[max(0, min(int(v/highest*float32(len(bars))), len(bars)-1))])
	}
	return b.String()
}
