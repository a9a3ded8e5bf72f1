"""placeholder"""
def initialize_from_teacher(student, teacher): raise NotImplementedError
