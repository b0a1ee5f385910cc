package picture

import (
	"fmt"
	"math"
	"strings"
)

// Chart is one panel of a dashboard.
type Chart struct {
	Title, Unit string // Grafana's unit
	Series      []Series
}

// Series is one line of a chart.
type Series struct {
	Name   string
	Points [][2]float64 // time, value
}

const (
	chartWidth, chartHeight = 480, 200
	left, above, below      = 56, 28, 40
	legend                  = 4 // names that there is room for
)

var lineColours = []string{"#56d364", "#e3b341", "#6ca4f8", "#ff7b72", "#db61a2", "#56d4dd"}

// Charts draws charts of the time from to until, in seconds, in two columns.
func Charts(all []Chart, from, until float64) []byte {
	var b strings.Builder
	begin(&b, 2*chartWidth+margin, (len(all)+1)/2*chartHeight+margin)
	for i := range all {
		fmt.Fprintf(&b, `<g transform="translate(%d %d)" font-family="sans-serif" `+
			`font-size="11" fill="%s">`+"\n", i%2*chartWidth+margin/2,
			i/2*chartHeight+margin/2, foreground)
		all[i].draw(&b, from, until)
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

func (c *Chart) draw(b *strings.Builder, from, until float64) {
	const width, height = chartWidth - left - 16, chartHeight - above - below
	highest := 0.0
	for _, s := range c.Series {
		for _, p := range s.Points {
			highest = max(highest, p[1])
		}
	}
	if highest == 0 {
		highest = 1
	}
	fmt.Fprintf(b, `<text x="%d" y="16" font-size="13" font-weight="bold">%s</text>`+"\n", left,
		escaped(c.Title))
	for _, share := range []float64{0, 0.5, 1} {
		y := float64(above) + height*(1-share)
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.0f" y2="%.0f" stroke="#30363d"/>`+
			`<text x="%d" y="%.0f" text-anchor="end">%s</text>`+"\n", left, left+width, y, y,
			left-6, y+4, Number(share*highest, c.Unit))
	}
	for i, s := range c.Series {
		colour := lineColours[i%len(lineColours)]
		fmt.Fprintf(b, `<polyline fill="none" stroke-width="1.5" stroke="%s" points="`, colour)
		for _, p := range s.Points {
			fmt.Fprintf(b, "%.1f,%.1f ", left+width*(p[0]-from)/(until-from),
				above+height*(1-p[1]/highest))
		}
		b.WriteString(`"/>` + "\n")
		if i < legend {
			fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n",
				left+i*width/legend, chartHeight-20, colour, escaped(s.Name))
		}
	}
}

// Number is a value in a unit of Grafana's.
func Number(v float64, unit string) string {
	switch unit {
	case "percentunit":
		return fmt.Sprintf("%.3g %%", 100*v)
	case "bytes", "Bps":
		const units = "BKMGT"
		i := 0
		for ; v >= 1024 && i < len(units)-1; i++ {
			v /= 1024
		}
		text := fmt.Sprintf("%.3g %c", v, units[i])
		if unit == "Bps" {
			text += "/s"
		}
		return text
	}
	return fmt.Sprintf("%.3g", math.Round(v*1e6)/1e6)
}
