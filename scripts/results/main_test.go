package main

import (
	"strings"
	"testing"
)

// transcript is what a guest prints whose tests are all as they should be.
const transcript = `@release 6.1.0-50-cloud-amd64
@package pkg/loader
=== RUN   TestRootAttach
=== RUN   TestRootAttach/docker0
    loader_root_test.go:14: attach mode: clsact
--- PASS: TestRootAttach (0.26s)
    --- PASS: TestRootAttach/docker0 (0.25s)
=== RUN   TestRootBoth
=== RUN   TestRootBoth/clsact
=== RUN   TestRootBoth/tcx
    testnet.go:62: needs Linux 6.5
--- PASS: TestRootBoth (0.90s)
    --- PASS: TestRootBoth/clsact (0.40s)
    --- SKIP: TestRootBoth/tcx (0.00s)
=== RUN   TestRootLinks
    loader_root_test.go:20: needs Linux 6.6
--- SKIP: TestRootLinks (0.00s)
PASS
@exit 0
@package pkg/doctor
=== RUN   TestRootDoctor
--- PASS: TestRootDoctor (1.50s)
PASS
@exit 0
@end
`

func TestTable(t *testing.T) {
	want := []string{"pkg/doctor TestRootDoctor", "pkg/loader TestRootAttach",
		"pkg/loader TestRootBoth", "pkg/loader TestRootLinks"}
	f := func(name, old, new string, wantOK bool, wantText ...string) {
		t.Helper()
		in := transcript
		if old != "" {
			in = strings.ReplaceAll(transcript, old, new)
		}
		if old != new && in == transcript {
			t.Fatalf("%s: the transcript has no %q", name, old)
		}
		var out strings.Builder
		g := parse(strings.NewReader(in))
		g.name = "6.1"
		if ok := table(&out, want, []*guest{g}); ok != wantOK {
			t.Errorf("%s: got %v, want %v:\n%s", name, ok, wantOK, &out)
		}
		for _, s := range wantText {
			if !strings.Contains(out.String(), s) {
				t.Errorf("%s: got no %q in:\n%s", name, s, &out)
			}
		}
	}
	f("good", "", "", true,
		"pkg/loader TestRootAttach  ok 0.26s clsact", "TestRootBoth    ok 0.90s clsact",
		"TestRootLinks   - (needs 6.6)", "ok 1.50s", "4 of 4")
	f("failed", "PASS: TestRootDoctor", "FAIL: TestRootDoctor", false, "TestRootDoctor on 6.1: FAIL", "3 of 4")
	f("failure shows its output", "PASS: TestRootAttach", "FAIL: TestRootAttach", false, "loader_root_test.go:14")
	f("no result", "--- PASS: TestRootDoctor", "panic:", false, "TestRootDoctor on 6.1: NO RESULT")
	f("never ran", "TestRootDoctor", "TestRootOther", false, "NO RESULT")
	f("other package's result", "@package pkg/doctor", "@package pkg/loader", false, "NO RESULT")
	f("kernel has it", "6.1.0-50", "6.12.3", false, "SKIPPED")
	f("same kernel has it", "6.1.0-50", "6.6.0", false, "SKIPPED")
	f("kernel has what a subtest needs", "needs Linux 6.5", "needs Linux 6.1", false, "TestRootBoth on 6.1: SKIPPED")
	f("both ways", "SKIP: TestRootBoth/tcx", "PASS: TestRootBoth/tcx", true, "TestRootBoth    ok 0.90s clsact tcx")
	f("skip without a reason", "needs Linux 6.6", "not today", false, "SKIPPED")
	f("tests ended badly", "@exit 0", "@exit 2", false, "pkg/loader: the tests ended with code 2")
	f("kernel complained", "@end", "@problem WARNING: CPU: 0\n@end", false, "6.1: WARNING: CPU: 0")
	f("died", "@end", "", false, "did not come to its end", "4 of 4")
	f("skip for the Engine", "needs Linux 6.6", "needs Docker Engine 25.0", true, "- (needs 25.0)")
	f("serial line", "\n", "\r\n", true)
	f("did not start", transcript, "", false, "6.1 (did not start)")
}
