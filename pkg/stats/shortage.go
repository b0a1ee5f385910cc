package stats

import (
	"time"

	"metad/pkg/fdbudget"

	"go.uber.org/zap"
)

// shortage handles samples that failed because the process had no file descriptor free. One call at
// a time.
type shortage struct {
	log     *zap.Logger
	budget  *fdbudget.Budget
	samples int       // failed since the last log line
	logged  time.Time // the time of that line
}

// failed makes the budget close descriptors that are kept only to save work, and logs the failure,
// at most once a minute.
func (s *shortage) failed(err error) {
	s.budget.Exhausted()
	s.samples++
	if now := time.Now(); s.logged.IsZero() || now.Sub(s.logged) >= time.Minute {
		s.log.Warn("no file descriptor free: statistics are late",
			zap.Int("samples", s.samples), zap.Error(err))
		s.logged, s.samples = now, 0
	}
}
