// Package expect has the checks that tests of several packages share: waiting for a condition, the
// field that an error names, and golden files.
package expect

import (
	"bytes"
	"flag"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// patience ends a test that hangs. It is no promise about time: a loaded machine may take seconds
// for what takes a millisecond elsewhere.
const patience = 30 * time.Second

var update = flag.Bool("update", false, "write the golden files anew")

// Until waits until ok returns true, and ends the test if that takes longer than half a minute.
// what says what is waited for; each show adds to the message what there is instead.
func Until(t testing.TB, what string, ok func() bool, show ...func() any) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().Before(deadline) {
			continue
		}
		for _, s := range show {
			t.Logf("there is: %v", s())
		}
		t.Fatalf("waited %s in vain for: %s", patience, what)
	}
}

// Goroutines returns the stacks of all goroutines, to be shown by Until.
func Goroutines() any {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// Field fails the test unless err begins with the name of the field, or is nil if field is "".
func Field(t testing.TB, err error, field string) {
	t.Helper()
	name := ""
	if err != nil {
		name, _, _ = strings.Cut(err.Error(), " ")
	}
	if strings.TrimSuffix(name, ":") != field {
		t.Errorf("got error %v, want one of field %q", err, field)
	}
}

// Golden compares got with the file, byte for byte. With -update it writes the file.
func Golden(t testing.TB, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}
