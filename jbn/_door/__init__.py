"""The door: what a public function is given becomes values that cannot be wrong, or an error that says what to do."""
