"""Every fault that users found has a test named after its entry: ``test_b4_…`` in one of tests/test_faults_*.py."""
