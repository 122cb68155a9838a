package keyguard

// Headline is the first line of every message about the key.
func (s Status) Headline() string {
	if s.Ready() {
		return "External encryption key is ready"
	}
	return "External encryption key is not ready"
}

// Cause TODO
func (s Status) Cause() string { return s.Detail }

// NextStep TODO
func (s Status) NextStep() string { return "" }
