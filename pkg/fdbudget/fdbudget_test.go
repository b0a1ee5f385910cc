package fdbudget

import (
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// host counts descriptors that a test opens by a number.
type host struct {
	others int
	err    error
	budget *Budget
}

func newHost(limit, others int) *host {
	h := &host{others: others}
	h.budget = New(limit, func() (int, error) {
		if h.budget == nil {
			return h.others, h.err
		}
		return h.others + int(h.budget.kept.Load()), h.err
	})
	return h
}

// Of 1,024 descriptors a quarter stays free beside those that others use, however many are asked
// for.
func TestOthersComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(1024, 300)
		kept := 0
		for h.budget.Keep(13) {
			kept += 13
		}
		if kept < 300 || kept+300 > 1024-256 {
			t.Errorf("kept %d of 1024 beside 300 others, want some and 256 free", kept)
		}
		if u := h.budget.Usage(); u.Kept != kept || u.Limit != 1024 {
			t.Errorf("got %+v, want %d kept", u, kept)
		}
	})
}

// When the others need more, what is kept is too much until enough of it is given back.
func TestGivenBackUnderPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(1024, 300)
		for h.budget.Keep(13) {
		}
		if h.budget.Over() {
			t.Fatal("over the budget at once")
		}
		h.others += 200
		time.Sleep(2 * countEvery)
		given := 0
		for h.budget.Over() {
			h.budget.Drop(13)
			if given += 13; given > 300 {
				t.Fatal("gave back 300 descriptors for 200")
			}
		}
		if given < 150 {
			t.Errorf("gave back %d descriptors, want about as many as the 200 that "+
				"others need", given)
		}
		if h.budget.Keep(13) {
			t.Error("what was given back was taken again at once")
		}
	})
}

// A process without a free descriptor keeps none for a while, then as many as before.
func TestExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(1024, 300)
		if !h.budget.Keep(13) {
			t.Fatal("got none")
		}
		h.budget.Exhausted()
		if !h.budget.Over() || h.budget.Keep(1) {
			t.Error("exhausted: there is room")
		}
		time.Sleep(exhausted + time.Second)
		if h.budget.Over() || !h.budget.Keep(13) {
			t.Error("later: there is no room")
		}
		h.err = errors.New("cannot count")
		time.Sleep(time.Second)
		if !h.budget.Over() {
			t.Error("cannot count: there is room")
		}
	})
}

// Counting that takes long is done rarely.
func TestCountingStaysCheap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		counts := 0
		b := New(1024, func() (int, error) {
			counts++
			time.Sleep(10 * time.Millisecond)
			return 10, nil
		})
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(
			time.Millisecond) {
			b.Over()
		}
		if counts > 13 {
			t.Errorf("counted %d times a minute, at 10 ms each", counts)
		}
	})
}

// The count is that of the descriptors that are open.
func TestOpenCount(t *testing.T) {
	before, err := openCount()
	if err != nil {
		t.Fatal(err)
	}
	const more = 50
	for range more {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	if after, err := openCount(); err != nil || after != before+more {
		t.Errorf("got %d after %d and %d more (%v)", after, before, more, err)
	}
}

func TestProcessHasTheLimit(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if got := Process().Usage().Limit; uint64(got) != limit.Cur {
		t.Errorf("got %d, want %d", got, limit.Cur)
	}
	if testing.AllocsPerRun(100, func() { Process().Over() }) != 0 {
		t.Error("Over allocates")
	}
}
