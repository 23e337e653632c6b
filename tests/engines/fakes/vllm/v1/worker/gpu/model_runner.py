class GPUModelRunner:
    def __init__(self, model_state):
        self.model_state = model_state

    def capture_model(self, *, profile_only=False):
        self.captured = self.during_capture()
        return 5 if profile_only else 7
