package picture

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

// wellFormed fails the test if a picture is no XML.
func wellFormed(t *testing.T, picture []byte) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(string(picture)))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("%v in %s", err, picture)
		}
	}
}

// Each text has its place, its colour and its weight, and is text whatever is in it.
func TestTerminal(t *testing.T) {
	got := Terminal("a\x1b[1;31mb<\x1b[0m c\n\x1b[7mbar\x1b[27m\n\n", 20)
	wellFormed(t, got)
	for _, want := range []string{`x="10" y="23" textLength="8"`, ">a<", `fill="#ff7b72" font-weight="bold">b&lt;`,
		`x="18" y="23" textLength="16"`, `x="34" y="23" textLength="16"`, `<rect x="10" y="27" width="24"`, `fill="#11151c">bar<`,
		`width="180" height="54"`} {
		if !strings.Contains(string(got), want) {
			t.Errorf("no %s in %s", want, got)
		}
	}
}

// A line goes from the first to the last point, as high as its value.
func TestCharts(t *testing.T) {
	got := Charts([]Chart{{Title: "a & b", Unit: "bytes", Series: []Series{{Name: "<x>",
		Points: [][2]float64{{100, 0}, {200, 2048}}}}}, {Title: "empty"}}, 100, 200)
	wellFormed(t, got)
	for _, want := range []string{"a &amp; b", "2 K", "1 K", "&lt;x&gt;",
		`points="56.0,160.0 464.0,28.0 "`, "empty"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("no %s in %s", want, got)
		}
	}
}

func TestNumber(t *testing.T) {
	f := func(v float64, unit, want string) {
		t.Helper()
		if got := Number(v, unit); got != want {
			t.Errorf("%v %s: got %q, want %q", v, unit, got, want)
		}
	}
	f(0.5, "percentunit", "50 %")
	f(512, "bytes", "512 B")
	f(3<<20, "Bps", "3 M/s")
	f(7, "short", "7")
}
