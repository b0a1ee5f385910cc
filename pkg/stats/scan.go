package stats

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"unsafe"
)

// parseUint reads a decimal number. As in the Engine's reader a negative one counts as 0: old
// kernels print those for counters that are summed up from several CPUs.
func parseUint(b []byte) (uint64, bool) {
	neg := len(b) > 0 && b[0] == '-'
	if neg {
		b = b[1:]
	}
	if len(b) == 0 || len(b) > 20 {
		return 0, false
	}
	var v uint64
	for _, d := range b {
		d -= '0'
		if d > 9 {
			return 0, false
		}
		if v > math.MaxUint64/10 || v*10 > math.MaxUint64-uint64(d) {
			return 0, false
		}
		v = v*10 + uint64(d)
	}
	if neg {
		return 0, true
	}
	return v, true
}

// nextLine cuts the first line off b. ok is false if the line has no end: the kernel ends every
// line, so the file is cut off.
func nextLine(b []byte) (line, rest []byte, ok bool) {
	i := bytes.IndexByte(b, '\n')
	if i < 0 {
		return nil, nil, false
	}
	return b[:i], b[i+1:], true
}

// nextField cuts the first field off a line; white space is spaces and tabs. After the last field
// it returns an empty one.
func nextField(b []byte) (field, rest []byte) {
	i := 0
	for i < len(b) && (b[i] == ' ' || b[i] == '\t') {
		i++
	}
	j := i
	for j < len(b) && b[j] != ' ' && b[j] != '\t' {
		j++
	}
	return b[i:j], b[j:]
}

// nextUint cuts the first field off a line and reads it as a number.
func nextUint(b []byte) (v uint64, rest []byte, ok bool) {
	f, rest := nextField(b)
	v, ok = parseUint(f)
	return v, rest, ok
}

// pairs walks a file of "key value" lines.
type pairs struct {
	rest []byte
	err  error
}

// next returns the next pair; ok is false at the end, and at a line of another format.
func (p *pairs) next() (key []byte, v uint64, ok bool) {
	if p.err != nil || len(p.rest) == 0 {
		return nil, 0, false
	}
	line, rest, ok := nextLine(p.rest)
	if !ok {
		p.err = fmt.Errorf("%w: half a line", errDamaged)
		return nil, 0, false
	}
	p.rest = rest
	key, line = nextField(line)
	v, line, ok = nextUint(line)
	if more, _ := nextField(line); !ok || len(more) > 0 {
		p.err = fmt.Errorf("%w: not a key and a number", errDamaged)
		return nil, 0, false
	}
	return key, v, true
}

// index is bytes.Index without a copy of s.
func index(b []byte, s string) int {
	// the string is not kept
	return strings.Index(unsafe.String(unsafe.SliceData(b), len(b)), s)
}

// inList reports whether a comma-separated list holds s. The empty list holds only "".
func inList(list []byte, s string) bool {
	for {
		head, tail, more := bytes.Cut(list, []byte{','})
		if string(head) == s {
			return true
		}
		if !more {
			return false
		}
		list = tail
	}
}
